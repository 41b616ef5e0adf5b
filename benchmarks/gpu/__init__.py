"""All GPU measurements, in one command that takes at most ten minutes."""
