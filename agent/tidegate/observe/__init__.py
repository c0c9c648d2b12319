"""Kernel and sidecar to evidence: flow classes, sidecar counters, the ledger."""
