"""`bench`: one fixed piece of RL, timed here and under TRL's last PPO trainer.

Every measurement is a process of its own (`ours.py`, `trl_ppo.py`), so that its peak memory is its own;
`command.py` runs them in turn, since machines drift.
"""
