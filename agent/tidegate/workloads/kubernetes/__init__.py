"""Pods of this node, as the API of Kubernetes tells them."""
