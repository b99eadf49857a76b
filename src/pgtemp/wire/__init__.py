"""The frontend/backend protocol, version 3, sans-IO: bytes in, values out."""
