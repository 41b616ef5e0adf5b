"""What draws completions."""
