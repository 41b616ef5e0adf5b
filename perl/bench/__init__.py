"""`bench step`: a fixed RL workload, measured in a separate process so that its peak memory is its own.

`perl.commands.bench` alternates between it and its peers, since machines drift. The peers, and benchmarks of the
parts of a step, are scripts in benchmarks/ of a checkout.
"""
