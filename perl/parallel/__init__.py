"""Several processes that run one recipe together: who they are, who is alive, and how they share a base."""
