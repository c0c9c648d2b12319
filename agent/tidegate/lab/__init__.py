"""Pods on one machine: network namespaces, a routed network, real sidecars and real traffic."""
