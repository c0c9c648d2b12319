"""The API of Kubernetes, as far as an agent reads it: lists and watches; nothing of what is read."""
