"""A reward function with TRL's signature: the number of different animals that a story mentions."""

import re
from typing import Any

ANIMALS = re.compile(
    r"\b(cat|dog|bird|bunny|rabbit|bear|fish|frog|duck|mouse|lion|tiger|monkey|elephant|horse|cow|pig|sheep|fox|bee)s?\b"
)


def animals(completions: list[str], **columns: Any) -> list[float]:
    """Return one point for each kind of animal, at most three."""
    return [float(min(3, len(set(ANIMALS.findall(text.lower()))))) for text in completions]
