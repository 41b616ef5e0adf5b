"""Checks and guards that RL learns, and learns what it should."""
