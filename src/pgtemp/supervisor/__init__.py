"""The supervisor: a process that starts and stops servers, so that none outlives its owner."""
