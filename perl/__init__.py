"""PERL: RLHF in which every learned part is a LoRA adapter on one frozen base."""

__version__ = "0.1.0"
