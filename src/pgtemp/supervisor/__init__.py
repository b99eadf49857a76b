"""Nothing outlives its owner: the process that starts and stops servers, and sweeps."""
