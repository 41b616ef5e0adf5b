"""Measurements of a run: quality, memory, time."""
