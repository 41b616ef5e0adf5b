"""Models × rewards × scales under default settings: does RL work for models and rewards it was not tuned on?"""
