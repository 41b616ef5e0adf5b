"""Reads data sets of the hub, or folders in a hub repository's layout, with the datasets library."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perl.data.jsonl import read_values
from perl.data.records import Records
from perl.data.tables import numbered_rows
from perl.errors import MachineError, UserError, machine_fault

TEST = ("test", "validation", "valid", "dev", "eval")
"""Names of splits to hold out if there is a `train` split; the first that exists is used."""


def load_splits(
    repository: str, remedy: str, part: str | None = None, revision: str | None = None
) -> dict[str, Any]:
    """Load the splits of a data set, by name.

    Args:
        repository: a hub id or a folder.
        remedy: the remedy in the message if it cannot be loaded.
        part: a folder in the repository.

    Raises:
        UserError: a folder cannot be read.
        MachineError: the hub cannot be reached.
    """
    import datasets  # takes a second, which readers of JSON Lines should not wait for

    try:
        return dict(datasets.load_dataset(repository, data_dir=part, revision=revision))
    except Exception as error:  # hub, network, cache and file formats each have their own exceptions
        cause = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        refusal = UserError if Path(repository).is_dir() else MachineError
        what = f"cannot be loaded with the datasets library: {cause}"
        where = f"{repository}/{part}" if part else repository
        raise machine_fault(error) or refusal(what, where=where, remedy=remedy) from error


def read_hub(path: Path | None, columns: Mapping[str, str]) -> Records:
    """Read the rows of `ID` or `ID:SPLIT`, in TRL's formats; without a split, the test split is held out.

    Raises:
        UserError: no id is given, or there is no such split.
        MachineError: the hub cannot be reached.
    """
    if path is None:
        remedy = "Set data.path to an id, such as org/name."
        raise UserError("hub needs a data set", where="data.path", remedy=remedy)
    name, _, split = str(path).partition(":")
    splits = load_splits(name, "Check data.path, an id or ID:SPLIT, and the network.")
    if split and split not in splits:
        known = ", ".join(splits)
        raise UserError(f"there is no split {split!r}", where=f"{name}", remedy=f"Its splits are {known}.")
    held_out = next((one for one in TEST if one in splits and "train" in splits), None)
    chosen = [split] if split else ["train", held_out] if held_out else list(splits)
    return _together([_read(name, one, splits[one], columns) for one in chosen], test=bool(held_out and not split))


def _read(name: str, split: str, rows: Any, columns: Mapping[str, str]) -> Records:
    return read_values(f"{name} {split}", numbered_rows(rows, columns), columns)


def _together(parts: list[Records], test: bool) -> Records:
    """Combine all rows; the dialogues of a last part with test rows are held out, and removed from the others."""
    *_, last = parts
    held_out = frozenset(row.dialogue for row in last.rows()) if test else frozenset()
    kept = [*(part.where(lambda row: row.dialogue not in held_out) for part in parts[:-1]), last]
    return Records(
        demonstrations=[row for part in kept for row in part.demonstrations],
        ratings=[row for part in kept for row in part.ratings],
        comparisons=[row for part in kept for row in part.comparisons],
        prompts=[row for part in kept for row in part.prompts],
        problems=[one for part in parts for one in part.problems],
        published_test=held_out,
        notes=list(dict.fromkeys(note for part in parts for note in part.notes)),
    )
