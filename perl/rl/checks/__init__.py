"""What watches that RL learns, and learns what it should."""
