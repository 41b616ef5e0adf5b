"""The data sources: every name that `data.source` and `--data` accept, and its reader.

A plugin can add sources: `SOURCES["mine"] = Source(read_mine, "what it contains")`.
"""

import contextlib
import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from perl.data.arithmetic import corpus as arithmetic_corpus
from perl.data.arithmetic import simulate as simulate_arithmetic
from perl.data.chats import as_chats
from perl.data.fetch import TASKMASTER, Repository, cache_folder, fetch, pins
from perl.data.hub import read_hub
from perl.data.jsonl import FORMATS, read_jsonl
from perl.data.math_sets import MATH_SETS, read_math
from perl.data.published import PUBLIC_SETS, REMEDY, read_public
from perl.data.records import Records
from perl.data.rows import no_usable_row
from perl.data.simulator.source import corpus, simulate
from perl.data.taskmaster import RELEASES, Domain, read_taskmaster
from perl.errors import UserError, machine_fault

Reader = Callable[[Path | None, int], Records]
"""Reads a folder or file, or the source's own data if the path is None; the seed is for sources that sample.

A row that cannot be used goes to `Records.problems`. An OSError becomes a message that names `data.path`.
"""


@dataclass(frozen=True, slots=True)
class Source:
    """A data source.

    Attributes:
        read: reads the rows for training.
        every_row: also reads the rows that training leaves out, for `data check`; by default `read`.
        fetch: downloads the data and returns their folder, for sources that must be downloaded first.
        remedy: the remedy if there is no usable row.
        mapped: reads with a mapping of column names to TRL's fields; None if the columns are fixed.
    """

    read: Reader
    description: str
    licence: str = ""
    homepage: str = ""
    every_row: Reader | None = None
    fetch: Callable[[], Path] | None = None
    remedy: str = "Check data.path."
    mapped: Callable[[Path | None, Mapping[str, str]], Records] | None = None


def find_source(name: str) -> Source:
    """Return the source with this name; `UserError` with the closest valid name if there is none."""
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        sets = ", ".join(name for name in SOURCES if "/" not in name)  # without their parts
        remedy = f"{hint}The sources are {sets}; for your own data, name a file that ends in .jsonl."
        raise UserError(f"there is no source {name!r}", where="data.source", remedy=remedy)
    return SOURCES[name]


def load_records(
    name: str,
    path: str | None,
    seed: int,
    columns: Mapping[str, str] | None = None,
    key: str = "data.path",
    chat: bool = False,
) -> Records:
    """Load a source's records for training.

    Args:
        name: a name in `SOURCES`.
        path: a folder or file that the source reads instead of its own data.
        seed: seed for sources that sample their data.
        columns: the file's column names, by the field names of TRL's formats.
        key: the recipe key of the path, for messages.
        chat: whether to convert plain text to chats.

    Raises:
        UserError: the source is unknown, its data are missing, or no row is usable.
    """
    records = _load(name, _reader(find_source(name), columns, find_source(name).read), path, seed, key)
    return as_chats(records) if chat else records


def load_rows(name: str, path: str | None, seed: int, columns: Mapping[str, str] | None = None) -> Records:
    """Load records as `load_records` does, including rows that training leaves out, such as repeats."""
    source = find_source(name)
    return _load(name, _reader(source, columns, source.every_row or source.read), path, seed)


def _reader(source: Source, columns: Mapping[str, str] | None, otherwise: Reader) -> Reader:
    """Return the reader of a source, with a mapping of columns if there is one."""
    if not columns:
        return otherwise
    if source.mapped is None:
        raise UserError("the columns of this source are fixed", where="data.columns", remedy="Remove it.")
    mapped = source.mapped
    return lambda path, seed: mapped(path, columns)


def _load(name: str, read: Reader, path: str | None, seed: int, key: str = "data.path") -> Records:
    # Path.expanduser raises for an unknown user's home.
    location = None if path is None else Path(os.path.expanduser(path))
    try:
        if location is not None:
            with contextlib.suppress(OSError):
                location.lstat()
    except ValueError as error:  # a NUL character or an unpaired surrogate, which no file name has
        raise UserError(f"cannot be read: {error}", where=str(location), remedy=f"Check {key}.") from None
    try:
        records = read(location, seed)
    except FileNotFoundError as error:
        where = str(error.filename or path)
        raise UserError("there is no such file", where=where, remedy=f"Check {key}.") from None
    except IsADirectoryError as error:
        remedy = f"Set {key} to a file, or data.source to the source whose folder this is."
        raise UserError("is a folder; a file expected", where=str(error.filename), remedy=remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        file, cause = (error.filename, error.strerror) if isinstance(error, OSError) else (None, None)
        where, what = str(file or path), f"cannot be read: {cause or error}"
        raise machine_fault(error) or UserError(what, where=where, remedy=f"Check {key}.") from None
    if not any(records.by_kind().values()):
        raise no_usable_row(records.problems, path or name, SOURCES[name].remedy)
    return records


def fetch_source(name: str) -> Path:
    """Download a source and return its folder.

    Raises:
        UserError: there is no such source, or nothing to download for it.
        MachineError: the network or the disk fails.
    """
    download = find_source(name).fetch
    if download is None:
        remedy = f"These can be fetched: {', '.join(name for name in SOURCES if SOURCES[name].fetch)}."
        raise UserError(f"there is nothing to fetch for {name!r}", remedy=remedy)
    return download()


def parse_source(text: str) -> tuple[str, str | None]:
    """Return name and path, its `~` expanded, from the command line's `SOURCE`, `SOURCE:PATH` or `FILE`.

    Raises:
        UserError: neither a known source nor a file.
    """
    text = os.path.expanduser(text)
    name, colon, path = text.partition(":")
    # A file in our own formats needs no source name.
    own = text.endswith((".jsonl", ".json", ".csv", ".tsv", ".parquet"))
    if name not in SOURCES and (own or os.path.isfile(text)):
        return "jsonl", text
    find_source(name)
    if colon and not path:
        raise UserError(f"{text!r} has no path", remedy=f"Write {name} or {name}:PATH.")
    return name, os.path.expanduser(path) or None


# The sources of this package.


def _no_files(source: str, path: Path | None) -> None:
    if path is not None:
        remedy = "Remove data.path, or set data.source to jsonl to read a file."
        raise UserError(f"{source} reads no files, but {path} is given", where="data.path", remedy=remedy)


def _arithmetic_simulator(path: Path | None, seed: int) -> Records:
    _no_files("arithmetic-simulator", path)
    records = simulate_arithmetic(seed, demonstrations=2_000, prompts=2_000)
    records.corpus = partial(arithmetic_corpus, seed=0, count=40_000)
    return records


def _coffee_simulator(path: Path | None, seed: int) -> Records:
    _no_files("coffee-simulator", path)
    records = simulate(seed=seed, dialogues=1250, ratings=8000, prompts=1500, noise=0.1)
    # The same corpus for every seed: all runs have the same base.
    records.corpus = partial(corpus, seed=0, dialogues=8_000)
    return records


def _file(path: Path | None, columns: Mapping[str, str]) -> Records:
    if path is None:
        raise UserError("jsonl needs a file", where="data.path", remedy="Set data.path to a .jsonl file.")
    return read_jsonl(path, columns)


def _taskmaster(domain: Domain, description: str) -> Source:
    def read(path: Path | None, seed: int, every_row: bool = False) -> Records:
        return read_taskmaster(
            path or _fetched(f"taskmaster-{domain}", RELEASES[domain], TASKMASTER), domain, every_row
        )

    return Source(
        read,
        description,
        licence="CC BY 4.0",
        homepage="https://github.com/google-research-datasets/Taskmaster",
        every_row=partial(read, every_row=True),
        fetch=partial(fetch, RELEASES[domain], TASKMASTER),
    )


def _fetched(source: str, release: str, repository: Repository) -> Path:
    """Return the folder that `data fetch` fills."""
    folder = cache_folder(repository)
    if missing := [pin.path for pin in pins(release, repository) if not (folder / pin.path).is_file()]:
        remedy = f"Run `perl-rlhf data fetch {source}`, or set data.path to a checkout of the repository."
        raise UserError(f"{source} has not been fetched: no {missing[0]}", where=str(folder), remedy=remedy)
    return folder


def _math(name: str) -> Source:
    def read(path: Path | None, seed: int) -> Records:
        return read_math(chosen, path or _fetched(name, chosen.folder, chosen.repository))

    chosen = MATH_SETS[name]
    return Source(
        read,
        chosen.description,
        chosen.licence,
        f"https://github.com/{chosen.repository.name}",
        fetch=partial(fetch, chosen.folder, chosen.repository),
        remedy="Set data.path to the folder with the published files, see data/README.md.",
    )


def _public(name: str) -> Source:
    def read(path: Path | None, seed: int, every_row: bool = False) -> Records:
        return read_public(public, path, every_row)

    public = PUBLIC_SETS[name]
    page = f"https://huggingface.co/datasets/{public.repository}"
    return Source(read, public.description, public.licence, page, partial(read, every_row=True), remedy=REMEDY)


SOURCES: dict[str, Source] = {
    "coffee-simulator": Source(
        _coffee_simulator, "simulated orders in a coffee shop, with a gold judge", licence="this project's"
    ),
    "arithmetic-simulator": Source(
        _arithmetic_simulator, "simulated word problems, with an exact checker", licence="this project's"
    ),
    "taskmaster-coffee": _taskmaster("coffee", "coffee orders with people: dialogues and rated turns"),
    "taskmaster-ticketing": _taskmaster("ticketing", "movie ticket orders with people: rated turns"),
    "jsonl": Source(
        lambda path, _: _file(path, {}),
        "a file of your own in TRL's formats",
        remedy=f"Write rows with the fields {FORMATS}, in .jsonl one JSON object per line; data.columns maps "
        "other names.",
        mapped=_file,
    ),
    "hub": Source(
        lambda path, _: read_hub(path, {}),
        "a data set on the hub in TRL's formats, by its id",
        remedy=f"Its rows should have the fields {FORMATS}; data.columns maps other names.",
        mapped=read_hub,
    ),
    **{name: _math(name) for name in MATH_SETS},
    **{name: _public(name) for name in PUBLIC_SETS},
}
