"""What a lease is allocated, and where allocations come from."""
