"""The names of the roles."""

from enum import StrEnum
from pathlib import Path


class Role(StrEnum):
    """A role; its value is the name of its adapter. `BASE` has no adapter."""

    BASE = "base"
    SFT = "sft"
    POLICY = "policy"
    REWARD = "reward"
    REWARD_2 = "reward_2"
    REWARD_3 = "reward_3"
    REWARD_4 = "reward_4"
    REWARD_5 = "reward_5"
    REWARD_6 = "reward_6"
    REWARD_7 = "reward_7"
    REWARD_8 = "reward_8"
    CRITIC = "critic"

    @property
    def folder(self) -> Path:
        """The role's folder inside its run; further members of a reward ensemble are inside the first member's."""
        member = REWARD_MEMBERS.index(self) if self in REWARD_MEMBERS else 0
        return Path(Role.REWARD, f"member-{member + 1}") if member else Path(self)

    @property
    def has_head(self) -> bool:
        """Whether the role computes scores or values."""
        return self is Role.CRITIC or self in REWARD_MEMBERS


REWARD_MEMBERS = tuple(role for role in Role if role.startswith(Role.REWARD))
"""The reward model and the further members that an ensemble can have, in order."""
