"""`bench`: one fixed piece of RL, timed here and under TRL's last PPO trainer, and the parts it is made of.

Every measurement of `step` is a process of its own (`ours.py`, `trl_ppo.py`), so that its peak memory is its own;
`command.py` runs them in turn, since machines drift. The other parts are measured in the process of the command:
what they say of memory is live tensor bytes, not what a process holds.
"""
