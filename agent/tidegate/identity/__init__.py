"""Who a workload is in the mesh: SPIFFE names, the mesh CA, leaf certificates."""
