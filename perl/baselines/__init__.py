"""Baselines for RL with a reward model: training on the same ratings without one."""
