"""What RL on a reward model is compared with: training on the same ratings without one."""
