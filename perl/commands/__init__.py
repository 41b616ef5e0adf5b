"""The commands: a file has a command's signature and what it does with it.

At their top they import nothing that imports torch, which takes seconds: neither help nor a typo waits for it.
"""
