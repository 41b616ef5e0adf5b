"""Models × rewards × scales under default settings: does RL work for what nobody here has tuned to?"""
