"""`bench step`: one fixed piece of RL, measured in a process of its own, so that its peak memory is its own.

`perl.commands.bench` runs it and its peers in turn, since machines drift. The peers, and the parts that a step is
made of, are scripts in benchmarks/ of a checkout.
"""
