"""What scores completions."""
