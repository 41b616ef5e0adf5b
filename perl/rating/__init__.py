"""`rate`: people rate completions on a page; their ratings are appended to a file."""
