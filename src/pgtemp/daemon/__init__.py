"""The daemon: one port, on which each connection gets a lease."""
