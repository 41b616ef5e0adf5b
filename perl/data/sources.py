"""The registry of sources: every name that `data.source` and `--data` take, and what reads it."""

import difflib
import os
from collections.abc import Callable
from pathlib import Path

from perl.data.fetch import cache_folder, pins
from perl.data.jsonl import read_jsonl
from perl.data.published import PUBLIC_SETS, PublicSet, read_public, read_public_rows
from perl.data.records import Records
from perl.data.simulator.source import corpus, simulate
from perl.data.taskmaster import Domain, read_rows, read_taskmaster
from perl.errors import UserError

Loader = Callable[[str | None, int], Records]
"""Reads a path, or where there is none the source's own data; the seed is for sources that draw theirs."""


def load_records(source: str, path: str | None, seed: int) -> Records:
    """What a source holds, as training should see it.

    Args:
        source: a name in `SOURCES`.
        path: a folder or file that the source reads instead of its own data.
        seed: for the sources that draw their data.

    Raises:
        UserError: an unknown source, data that is missing, or nothing usable in it.
    """
    if source not in SOURCES:
        raise _unknown(source)
    return SOURCES[source](path, seed)


def load_rows(source: str, path: str | None, seed: int) -> Records:
    """As `load_records`, with the rows that repeat or contradict others where training leaves them out."""
    untidied = _UNTIDIED.get(source)
    return untidied(path, seed) if untidied else load_records(source, path, seed)


def parse_source(text: str) -> tuple[str, str | None]:
    """Reads the command line's `SOURCE`, `SOURCE:PATH` or `FILE`.

    Raises:
        UserError: neither a known source nor a file.
    """
    name, colon, path = text.partition(":")
    if name in SOURCES:
        if colon and not path:
            raise UserError(f"{text!r} names no path", remedy=f"Write {name} or {name}:PATH.")
        return name, path or None
    # A file in own formats needs no name before it.
    if text.endswith((".jsonl", ".json")) or os.path.isfile(os.path.expanduser(text)):
        return "jsonl", text
    raise _unknown(name)


def _unknown(name: str) -> UserError:
    near = difflib.get_close_matches(name, SOURCES, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    whole = [name for name in SOURCES if "/" not in name]  # not the parts of sets
    remedy = f"{hint}There are {', '.join(whole)}; own data is a file that ends in .jsonl."
    return UserError(f"there is no source {name!r}", where="data.source", remedy=remedy)


def _coffee_simulator(path: str | None, seed: int) -> Records:
    if path is not None:
        remedy = "Leave data.path out, or set data.source to jsonl to read a file."
        raise UserError(f"coffee-simulator reads no files, but is given {path}", where="data.path", remedy=remedy)
    records = simulate(seed=seed, dialogues=1250, ratings=8000, prompts=1500, noise=0.1)
    # One corpus whatever the seed: the base is what all runs have in common.
    records.corpus = corpus(seed=0, dialogues=8_000)
    return records


def _taskmaster(domain: Domain, read: Callable[[str | Path, Domain], Records]) -> Loader:
    def load(path: str | None, seed: int) -> Records:
        return read(path or _fetched(f"taskmaster-{domain}"), domain)

    return load


def _fetched(source: str) -> Path:
    """The folder that `data fetch` fills."""
    folder = cache_folder()
    if missing := [pin.path for pin in pins(source) if not (folder / pin.path).is_file()]:
        remedy = f"Run `perl-rlhf data fetch {source}`, or set data.path to a checkout of the repository."
        raise UserError(f"{source} is not fetched: there is no {missing[0]}", where=str(folder), remedy=remedy)
    return folder


def _public(public: PublicSet, read: Callable[[PublicSet, str | None], Records]) -> Loader:
    return lambda path, seed: read(public, path)


def _jsonl(path: str | None, seed: int) -> Records:
    if path is None:
        raise UserError("jsonl needs a file", where="data.path", remedy="Set data.path to a .jsonl file.")
    return read_jsonl(os.path.expanduser(path))


SOURCES: dict[str, Loader] = {
    "coffee-simulator": _coffee_simulator,
    "taskmaster-coffee": _taskmaster("coffee", read_taskmaster),
    "taskmaster-ticketing": _taskmaster("ticketing", read_taskmaster),
    "jsonl": _jsonl,
    **{name: _public(public, read_public) for name, public in PUBLIC_SETS.items()},
}

_UNTIDIED: dict[str, Loader] = {
    "taskmaster-coffee": _taskmaster("coffee", read_rows),
    "taskmaster-ticketing": _taskmaster("ticketing", read_rows),
    **{name: _public(public, read_public_rows) for name, public in PUBLIC_SETS.items()},
}
