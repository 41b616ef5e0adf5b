"""A case of bad input: the error, and the phrases that its one message must contain."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One error in an otherwise valid run of the command line."""

    name: str
    says: tuple[str, str, str]
    """Phrases that the message must contain: cause, place or value, remedy."""
    command: str = "run"
    changes: dict[str, Any] = field(default_factory=dict)
    """Sections that replace those of a valid recipe; None removes one."""
    overrides: tuple[str, ...] = ()
    recipe: bytes | None = None
    """Content of the recipe file."""
    rows: list[Any] | bytes | None = None
    """Content of the data file."""
    spoil: Callable[[Path], None] | None = None
    """Called with a copy of a valid model's folder, which is then the base."""
    out: Callable[[Path], None] | None = None
    """Called with the path of the run folder, to prepare its content."""
    status: int = 2


def named(case: Case) -> str:
    """Return a case's name in pytest."""
    return case.name.replace(" ", "-")


def user(text: str) -> list[dict[str, str]]:
    """Return a prompt of one message."""
    return [{"role": "user", "content": text}]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return all paths in a folder with the bytes of its files, without Python's caches."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }
