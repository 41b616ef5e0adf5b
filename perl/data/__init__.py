"""Data sources and the records that they yield."""
