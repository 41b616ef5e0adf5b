"""The commands: each file has the signature of a command and what it does.

They import nothing at the top that imports torch, which takes seconds: help and typos should not wait for it.
"""
