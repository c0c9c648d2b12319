"""Thin, typed doors to the kernel: libbpf, libnftables, network namespaces. No policy."""
