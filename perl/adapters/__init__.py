"""The kinds of adapters: what each puts into the base, and what it computes."""
