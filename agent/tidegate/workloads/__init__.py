"""Who lives on this node: sources of workloads."""
