"""Redirection of connections to a workload's sidecar: one decision, one file per backend."""
