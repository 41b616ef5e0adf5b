"""The names of the roles."""

from enum import StrEnum
from pathlib import Path


class Role(StrEnum):
    """The values are the names of the roles' adapters; `BASE` has none."""

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
        """Of a role inside its run; further members of a reward ensemble are inside the first one's."""
        member = REWARD_MEMBERS.index(self) if self in REWARD_MEMBERS else 0
        return Path(Role.REWARD, f"member-{member + 1}") if member else Path(self)

    @property
    def has_head(self) -> bool:
        """Whether it gives scores or values."""
        return self is Role.CRITIC or self in REWARD_MEMBERS


REWARD_MEMBERS = tuple(role for role in Role if role.startswith(Role.REWARD))
"""The reward model, and what further members an ensemble can have, in order."""
