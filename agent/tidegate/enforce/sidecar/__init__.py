"""The sidecar: what Envoy should run, the files that tell it, its process and its admin API."""
