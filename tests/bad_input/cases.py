"""A case of bad input: what is wrong, and what the one message about it has to say."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One thing that is wrong with an otherwise good run of the command line."""

    name: str
    says: tuple[str, str, str]
    """Phrases that the message has to hold: cause, place or value, remedy."""
    command: str = "run"
    changes: dict[str, Any] = field(default_factory=dict)
    """Sections of the recipe that replace those of a good one; None takes one out."""
    overrides: tuple[str, ...] = ()
    recipe: bytes | None = None
    """The recipe file as it stands."""
    rows: list[Any] | bytes | None = None
    """The data file."""
    spoil: Callable[[Path], None] | None = None
    """Called with a copy of the good model's folder, which is then the base."""
    out: Callable[[Path], None] | None = None
    """Called with the path of the run folder, to put something there."""
    status: int = 2


def named(case: Case) -> str:
    """What pytest calls a case."""
    return case.name.replace(" ", "-")


def user(text: str) -> list[dict[str, str]]:
    """A prompt of one message."""
    return [{"role": "user", "content": text}]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, with the bytes of its files, less what Python caches."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }
