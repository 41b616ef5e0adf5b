"""The one shared base and the roles on it."""
