"""`rate`: people rate completions on a page; what they say is appended to a file of ratings."""
