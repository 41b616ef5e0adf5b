"""Terminal, signals, files and seeds."""
