"""Intent to kernel and sidecar: redirect rules and Envoy configuration."""
