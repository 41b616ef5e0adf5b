"""`data fetch`, `check`, `leaks` and `import`.

They download published data, describe a source, find test questions in training data, and import ratings.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from perl.commands.json_lines import Out, write_lines
from perl.commands.options import Columns, one_of, parse_columns, print_problems
from perl.data import imports
from perl.data.jsonl import FORMATS
from perl.data.leaks import find_leak
from perl.data.pairs import labels_by_answer, pair_ratings, without_repeats
from perl.data.records import Context, Rating, Record, Records, Turn, answers_of, content_of
from perl.data.rows import no_usable_row, sifted
from perl.data.sources import fetch_source, find_source, load_rows, parse_source
from perl.data.tables import UNREAD
from perl.errors import UserError
from perl.recipe import load_recipe
from perl.system.progress import console as messages
from perl.system.progress import counted

SHOWN_LEAKS = 3
console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
"""For results, which quote rows: these must not be read as markup or wrapped."""


def data_fetch(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Such as taskmaster-coffee.")],
) -> None:
    """Download a source, checked against pinned hashes."""
    messages.print(f"{source} is in {fetch_source(source)}", markup=False)


def data_check(
    source: Annotated[str, typer.Argument(metavar="SOURCE[:PATH]", help="A source, a file or a recipe.")],
    columns: Columns = None,
) -> None:
    """Describe a source or file, count its bad rows and name the first 50."""
    raise typer.Exit(check(source, parse_columns(columns)))


def data_leaks(
    train: Annotated[str, typer.Argument(metavar="TRAIN", help="Training data: SOURCE[:PATH] or a file.")],
    tests: Annotated[list[str], typer.Argument(metavar="TEST...", help="Test data: SOURCE[:PATH] or a file.")],
) -> None:
    """Count the questions of test sets that also occur in a training set."""
    trained_on = load_rows(*parse_source(train), 0)
    for test in tests:
        leak = find_leak(trained_on, load_rows(*parse_source(test), 0))
        console.print(f"{test}: {len(leak.found):,} of {leak.questions:,} distinct questions are in {train}")
        for text in leak.found[:SHOWN_LEAKS]:
            console.print(f"  {' '.join(text.split())}")


def data_import(
    source: Annotated[str, typer.Argument(metavar="FORMAT", help=f"{', '.join(imports.FORMATS)}.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The exported file.")],
    columns: Columns = None,
    out: Out = None,
) -> None:
    """Convert ratings exported elsewhere to JSON Lines, and count the rows without one."""
    one_of("FORMAT", source, list(imports.FORMATS))
    names = parse_columns(columns)
    rows, problems = sifted(imports.read_import(source, file, names))
    if not rows:
        raise no_usable_row(problems, str(file), f"Give a file of the format {source}; see data/README.md.")
    if absent := [name for field, name in names.items() if not any(field in row for row in rows)]:
        raise UserError(f"no row has {', '.join(absent)}", where=str(file), remedy="Correct --columns.")
    write_lines(out, rows)
    print_problems(messages, problems)
    messages.print(f"{counted(len(rows), 'row')} imported, {len(problems):,} left out")


def check(source: str, columns: Mapping[str, str] | None = None) -> int:
    """Describe the data of a source, a file or a recipe; print the first 50 bad rows and the number of others.

    Args:
        columns: column names in a file, by field name of TRL's formats; a recipe has its own.

    Returns:
        The exit code: 0, or 2 if any row is bad.

    Raises:
        UserError: there is no such source or file, or no usable row in it.
    """
    if source.endswith((".yaml", ".yml")):
        recipe = load_recipe(source)
        name, path, seed, columns = recipe.data.source, recipe.data.path, recipe.seed, recipe.data.columns
    else:
        (name, path), seed = parse_source(source), 0
    row, records = find_source(name), load_rows(name, path, seed, columns)
    kinds = {kind: rows for kind, rows in records.by_kind().items() if rows}
    console.print(f"{name}: {'; '.join(filter(None, (row.description, row.licence, row.homepage)))}")
    console.print(_table("", {kind: counts(rows) for kind, rows in kinds.items()}))
    console.print(_table("median/95 %/longest", {kind: sizes(rows) for kind, rows in kinds.items()}))
    for line in _facts(records):
        console.print(line)
    print_problems(console, records.problems)
    if not records.problems:
        unread = any(note.startswith(UNREAD) for note in records.notes)
        console.print("every row is usable, but columns are left out" if unread else "every row is usable")
        return 0
    console.print(f"{counted(len(records.problems), 'row')} left out")
    messages.print("Fix or remove these rows; a run would leave them out.")
    if any(problem.what.endswith("fit no format") for problem in records.problems):
        messages.print(f"Rows must have the fields {FORMATS}.", markup=False)
    return 2


def counts(rows: Sequence[Record]) -> dict[str, str]:
    """Return the number of records of one kind, and of their answers by type."""
    turns = [turn for row in rows for answer in answers_of(row) for turn in answer]
    by_agent = [turn for turn in turns if turn.speaker in ("agent", "text")]
    calls = sum(turn.is_call for turn in by_agent)
    numbers = {
        "rows": len(rows),
        "dialogues": len({row.dialogue for row in rows}),
        "duplicates": len(rows) - len({content_of(row) for row in rows}),
        "agent's calls": calls,
        "agent's texts": len(by_agent) - calls,
    }
    return {name: f"{number:,}" for name, number in numbers.items()}


def sizes(rows: Sequence[Record]) -> dict[str, str]:
    """Return the lengths of records of one kind. Characters are those of the turns' texts."""
    return {
        "context: turns": _spread(len(row.context) for row in rows),
        "characters": _spread(_characters(row.context) for row in rows),
        "answer: characters": _spread(_characters(answer) for row in rows for answer in answers_of(row)),
    }


def _characters(turns: Sequence[Turn]) -> int:
    return sum(len(turn.text) for turn in turns)


def _spread(sizes: Iterable[int]) -> str:
    """Return median, 95th percentile and maximum: lengths are skewed, and the longest determine the memory."""
    ordered = sorted(sizes)
    if not ordered:
        return "–"
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return f"{statistics.median_high(ordered):,}/{p95:,}/{ordered[-1]:,}"


def _table(title: str, cells: Mapping[str, Mapping[str, str]]) -> Table:
    table = Table(title, *next(iter(cells.values())), box=None)
    for name, row in cells.items():
        table.add_row(name, *row.values())
    return table


def _facts(records: Records) -> Iterator[str]:
    dialogues = {row.dialogue for row in records.rows()}
    yield f"{counted(len(dialogues), 'dialogue')} in all"
    if records.ratings:
        yield balance(records.ratings)
    # The number of rows with a confidence: a misspelt key would count as none.
    certain = [
        (sum(rating.probability is not None for rating in records.ratings), "soft label", ""),
        (sum(comparison.margin > 0 for comparison in records.comparisons), "comparison", " with a margin"),
        (sum(one.probability < 1 for one in records.comparisons), "comparison", " with a probability"),
    ]
    if any(count for count, _, _ in certain):
        yield "; ".join(f"{counted(count, what)}{more}" for count, what, more in certain if count)
    if records.judge:
        yield "a gold judge scores any answer to its prompts"
    if records.published_test:
        yield f"{counted(len(records.published_test), 'dialogue')} are the published test split, which is held out"
    yield from records.notes


def balance(ratings: Sequence[Rating]) -> str:
    """Describe the labels of ratings; an accuracy means nothing without that of a constant prediction."""
    up = sum(rating.label for rating in ratings)
    contradictions = sum(len(values) == 2 for values in labels_by_answer(ratings).values())
    labels: dict[Context, set[bool]] = defaultdict(set)
    for rating in without_repeats(ratings):
        labels[rating.context].add(rating.label)
    mixed = sum(len(values) == 2 for values in labels.values())
    return (
        f"{up:,} thumbs up, {len(ratings) - up:,} down: a constant prediction is right for "
        f"{max(up, len(ratings) - up) / len(ratings):.1%}; {counted(contradictions, 'answer')} with both labels; "
        f"{counted(mixed, 'context')} with both labels, which yield {counted(len(pair_ratings(ratings)), 'pair')}"
    )
