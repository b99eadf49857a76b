"""Images: data directories in the cache, from which those of servers are copied."""
