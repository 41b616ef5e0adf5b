"""The three stages of alignment: SFT, reward modelling and RL."""
