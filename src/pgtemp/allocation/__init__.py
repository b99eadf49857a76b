"""Allocations: the databases or servers that leases get, and the allocators that create them."""
