"""All that is measured on a GPU, by one command that a lease of ten minutes is enough for."""
