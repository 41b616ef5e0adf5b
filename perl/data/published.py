"""Reads the public preference sets from files in a folder, or from the hub with the `datasets` library.

If a set was published with a test part (or else a validation part), that part is held out. Training rows that
share a dialogue or post with it are left out, and so is a validation part if there is a test part.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from perl.data.hub import load_splits
from perl.data.preference_rows import hh_row, shp_row, tldr_row
from perl.data.records import Comparison, Context, Prompt, Records
from perl.data.rows import Row, line_value, numbered_lines, object_with, parsed, sifted
from perl.errors import UserError

Split = Literal["train", "validation", "test"]

_SPLITS: dict[str, Split] = {"train": "train", "valid": "validation", "validation": "validation", "test": "test"}
_SPLIT = re.compile(f"({'|'.join(_SPLITS)})(?![a-z])")
"""Beginning of names of files, folders and splits: `train.jsonl.gz`, `test-00000-of-00001.parquet`, `valid1`."""
_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_PARQUET = ".parquet"
REMEDY = "Set data.path to a folder with the published files: data/README.md has their addresses and layouts."


@dataclass(frozen=True, slots=True)
class PublicSet:
    """Where a set is published and how to read its rows.

    Attributes:
        repository: its hub repository; the newest `revision` by default.
        parts: the folders in the repository that belong to the set.
        comparison: converts a row to a record.
    """

    description: str
    licence: str
    repository: str
    parts: tuple[str, ...]
    comparison: Callable[[Row], Comparison]
    revision: str | None = None


_HH = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
_SHP = (
    *("askacademia", "askanthropology", "askbaking", "askcarguys", "askculinary", "askdocs", "askengineers"),
    *("askhistorians", "askhr", "askphilosophy", "askphysics", "askscience", "asksciencefiction"),
    *("asksocialscience", "askvet", "changemyview", "explainlikeimfive", "legaladvice"),
)
_SETS = {
    "hh-rlhf": PublicSet(
        "pairs of assistants' answers, helpful and harmless", "MIT", "Anthropic/hh-rlhf", _HH, hh_row
    ),
    "shp": PublicSet(
        "pairs of comments on posts of 18 subreddits",
        "see its card; Reddit's terms apply",
        "stanfordnlp/SHP",
        _SHP,
        shp_row,
    ),
    "tldr": PublicSet(
        "pairs of summaries of Reddit posts",
        "see its card",
        "openai/summarize_from_feedback",
        ("comparisons",),
        tldr_row,
        # Its main branch has a script, which `datasets` no longer runs; this branch is the hub's own conversion.
        revision="refs/convert/parquet",
    ),
}
PUBLIC_SETS = _SETS | {
    f"{name}/{part}": replace(public, parts=(part,))
    for name, public in _SETS.items()
    for part in public.parts
    if len(public.parts) > 1
}
"""The sets by their names in `data.source`: each set, and each part as `SET/PART`."""


@dataclass(frozen=True, slots=True)
class _Place:
    """The place of a row, and the split and part that its file or folder names."""

    where: str
    split: Split | None = None
    part: str | None = None


def read_public(public: PublicSet, path: Path | None, every_row: bool = False) -> Records:
    """Read a set; `Records.published_test` has the dialogues of its test part.

    Args:
        path: a folder in the published layout, a folder of one part, or a file; None: from the hub.
        every_row: include rows that training leaves out so that the test part does not leak.

    Raises:
        UserError: no file has rows.
        OSError: a file cannot be read.
        MachineError: the hub cannot be reached.
    """
    rows, problems = sifted(
        parsed(place.where, _row, public, place, value) for place, value in _values(public, path)
    )
    splits = {place.split for place, _ in rows}
    held_out: Split = "test" if "test" in splits else "validation"
    test: frozenset[str] = frozenset()
    if {"train", held_out} <= splits:
        test = frozenset(row.dialogue for place, row in rows if place.split == held_out)
    if test and not every_row:
        rows = [
            (place, row)
            for place, row in rows
            if place.split == held_out or (place.split == "train" and row.dialogue not in test)
        ]
    prompts: dict[Context, Prompt] = {}
    for place, row in rows:
        columns = {"source": place.part} if place.part else {}  # reward models are evaluated by source
        prompts.setdefault(row.context, Prompt(row.context, row.dialogue, columns))
    comparisons = [row for _, row in rows]
    return Records(comparisons=comparisons, prompts=list(prompts.values()), problems=problems, published_test=test)


def _row(public: PublicSet, place: _Place, value: object) -> tuple[_Place, Comparison]:
    row = object_with(line_value(value) if isinstance(value, bytes) else value)
    split = _split_of(str(row.get("split"))) or place.split or "train"
    return replace(place, split=split), public.comparison(row)


def _values(public: PublicSet, path: Path | None) -> Iterator[tuple[_Place, object]]:
    """Yield all rows; those of JSON Lines files are not parsed yet."""
    if path is None:
        yield from _from_datasets(public.repository, public.parts, public.revision)
        return
    if not path.is_dir():
        yield from _from_lines(path)
        return
    parts = [part for part in public.parts if (path / part).is_dir()]
    folders = [path / part for part in parts] or [path]
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())
    if lines := [file for file in files if file.name.endswith(_LINES)]:
        for file in lines:
            names = file.relative_to(path).parts
            split = next((split for name in reversed(names) if (split := _split_of(name))), None)
            yield from _from_lines(file, split, names[0] if names[0] in parts else None)
    elif any(file.suffix == _PARQUET for file in files):
        yield from _from_datasets(str(path), parts or [None], None)
    else:
        what = f"there is no file that ends in {', '.join((*_LINES, _PARQUET))}"
        raise UserError(what, where=str(path), remedy=REMEDY)


def _from_lines(file: Path, split: Split | None = None, part: str | None = None) -> Iterator[tuple[_Place, bytes]]:
    for number, line in numbered_lines(file):
        yield _Place(f"{file}:{number}", split, part), line


def _from_datasets(
    repository: str, parts: Sequence[str | None], revision: str | None
) -> Iterator[tuple[_Place, object]]:
    """Yield the rows of a hub repository, or of a folder in such a repository's layout."""
    for part in parts:
        name = f"{repository}/{part}" if part else repository
        for split, rows in load_splits(repository, REMEDY, part, revision).items():
            for index, row in enumerate(rows):
                yield _Place(f"{name} {split}[{index}]", _split_of(split), part), row


def _split_of(name: str) -> Split | None:
    match = _SPLIT.match(name)
    return _SPLITS[match[1]] if match else None
