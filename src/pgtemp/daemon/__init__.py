"""The front door: one port, each connection gets a lease."""
