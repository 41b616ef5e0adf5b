"""The three stages of alignment: SFT, reward model, RL."""
