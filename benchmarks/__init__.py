"""Measurements that take minutes or hours: commands of a checkout, no part of the package."""
