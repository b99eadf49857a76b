"""Images: data directories in the cache, from which the data directories of servers are copied."""
