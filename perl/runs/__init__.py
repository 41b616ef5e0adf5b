"""What a run writes: its folder and checkpoints."""
