"""What lives in a cluster, and who holds it."""
