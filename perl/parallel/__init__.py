"""Multiple processes that run one recipe together: the process group, heartbeats, and engines."""
