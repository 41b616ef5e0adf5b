"""What a run is measured by: quality, memory, time."""
