"""What a source holds, in metrics, and every row of it that cannot be used: `perl-rlhf data check`."""

import math
import statistics
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from perl.data.pairs import labels_by_answer, pair_ratings, without_repeats
from perl.data.records import Comparison, Context, Demonstration, Prompt, Rating, Records, Turn
from perl.data.sources import load_rows, parse_source

SHOWN_PROBLEMS = 50
Record = Demonstration | Rating | Comparison | Prompt


@dataclass(frozen=True, slots=True)
class Spread:
    """How a size is spread: lengths are skewed, and the longest decide the memory."""

    median: int
    p95: int
    longest: int

    def __str__(self) -> str:
        """The three, as a cell of the table."""
        return f"{self.median:,}/{self.p95:,}/{self.longest:,}"


@dataclass(frozen=True, slots=True)
class Summary:
    """One kind of record in metrics. Characters are those of the turns' texts."""

    count: int
    dialogues: int
    duplicates: int
    context_turns: Spread
    context_characters: Spread
    answer_characters: Spread | None
    calls: int
    texts: int


@dataclass(frozen=True, slots=True)
class Balance:
    """The labels of the ratings.

    Attributes:
        majority_accuracy: of a constant answer; a reward model's accuracy means nothing without it.
        contradictions: (context, answer) with both labels.
        mixed_contexts: contexts with both an up and a down answer.
        pairs: comparisons that those make.
    """

    up: int
    down: int
    majority_accuracy: float
    contradictions: int
    mixed_contexts: int
    pairs: int


@dataclass(frozen=True, slots=True)
class Description:
    """All that `data check` prints of a source's usable rows."""

    kinds: dict[str, Summary]
    dialogues: int
    balance: Balance | None


def describe(records: Records) -> Description:
    """Counts and measures what a source holds; kinds of which it has none are left out."""
    kinds: dict[str, Sequence[Record]] = {
        "demonstrations": records.demonstrations,
        "ratings": records.ratings,
        "comparisons": records.comparisons,
        "prompts": records.prompts,
    }
    return Description(
        kinds={name: _summary(rows) for name, rows in kinds.items() if rows},
        dialogues=len({row.dialogue for rows in kinds.values() for row in rows}),
        balance=_balance(records.ratings) if records.ratings else None,
    )


def check(source_or_file: str) -> int:
    """Prints the description of a source or file, then every bad row: the first 50 and how many more.

    Args:
        source_or_file: `SOURCE`, `SOURCE:PATH` or a file, as `parse_source` reads it.

    Returns:
        The exit status: 0, or 2 if any row is bad.

    Raises:
        UserError: there is no such source or file, or no usable row in it.
    """
    source, path = parse_source(source_or_file)
    records = load_rows(source, path, seed=0)
    description = describe(records)
    # Rows are quoted in what is printed: none of it may be read as markup, or be broken in the middle.
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(_counts_table(description))
    console.print(_sizes_table(description))
    console.print(f"{description.dialogues:,} dialogues in all")
    if description.balance:
        console.print(_balance_line(description.balance))
    if certainty := _certainty_line(records):
        console.print(certainty)
    for note in records.notes:
        console.print(note)
    for problem in records.problems[:SHOWN_PROBLEMS]:
        console.print(f"{problem.where}: {problem.what}")
    if len(records.problems) > SHOWN_PROBLEMS:
        console.print(f"… and {len(records.problems) - SHOWN_PROBLEMS:,} more")
    if not records.problems:
        console.print("every row is usable")
        return 0
    console.print(f"{len(records.problems):,} rows left out")
    Console(stderr=True).print("Mend or remove the rows named: a run would go on without them.")
    return 2


def _counts_table(description: Description) -> Table:
    table = Table("", "rows", "dialogues", "duplicates", "agent's calls", "agent's texts", box=None)
    for name, kind in description.kinds.items():
        counts = (kind.count, kind.dialogues, kind.duplicates, kind.calls, kind.texts)
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def _sizes_table(description: Description) -> Table:
    table = Table("median/95 %/longest", "context: turns", "characters", "answer: characters", box=None)
    for name, kind in description.kinds.items():
        answer = str(kind.answer_characters) if kind.answer_characters else "–"
        table.add_row(name, str(kind.context_turns), str(kind.context_characters), answer)
    return table


def _balance_line(balance: Balance) -> str:
    return (
        f"{balance.up:,} thumbs up, {balance.down:,} down: a constant answer is right for "
        f"{balance.majority_accuracy:.1%}; {balance.contradictions:,} answers with both labels; "
        f"{balance.mixed_contexts:,} contexts with both labels, which make {balance.pairs:,} pairs"
    )


def _certainty_line(records: Records) -> str:
    """How many rows say how sure they are: a misspelt key would be counted in none."""
    counts = {
        "soft labels": sum(rating.probability is not None for rating in records.ratings),
        "comparisons with a margin": sum(comparison.margin > 0 for comparison in records.comparisons),
        "comparisons with a probability": sum(comparison.probability < 1 for comparison in records.comparisons),
    }
    return "; ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def _summary(rows: Sequence[Record]) -> Summary:
    answers = [answer for row in rows for answer in _answers(row)]
    by_agent = [turn for answer in answers for turn in answer if turn.speaker in ("agent", "text")]
    calls = sum(turn.is_call for turn in by_agent)
    return Summary(
        count=len(rows),
        dialogues=len({row.dialogue for row in rows}),
        duplicates=len(rows) - len({_identity(row) for row in rows}),
        context_turns=_spread(len(row.context) for row in rows),
        context_characters=_spread(_characters(row.context) for row in rows),
        answer_characters=_spread(_characters(answer) for answer in answers) if answers else None,
        calls=calls,
        texts=len(by_agent) - calls,
    )


def _answers(row: Record) -> list[Context]:
    match row:
        case Demonstration():
            return [row.answer]
        case Rating():
            return [(row.answer,)]
        case Comparison():
            return [(row.better,), (row.worse,)]
        case Prompt():
            return []


def _identity(row: Record) -> Hashable:
    """What two rows that say the same share. Labels may differ in a contradiction, which is no duplicate."""
    label = row.label if isinstance(row, Rating) else None
    columns = repr(row.columns) if isinstance(row, Prompt) else None
    return (row.context, *_answers(row), label, columns)


def _balance(ratings: Sequence[Rating]) -> Balance:
    up = sum(rating.label for rating in ratings)
    contradictions = sum(len(labels) == 2 for labels in labels_by_answer(ratings).values())
    labels: dict[Context, set[bool]] = {}
    for rating in without_repeats(ratings):
        labels.setdefault(rating.context, set()).add(rating.label)
    return Balance(
        up=up,
        down=len(ratings) - up,
        majority_accuracy=max(up, len(ratings) - up) / len(ratings),
        contradictions=contradictions,
        mixed_contexts=sum(len(given) == 2 for given in labels.values()),
        pairs=len(pair_ratings(ratings)),
    )


def _characters(turns: Sequence[Turn]) -> int:
    return sum(len(turn.text) for turn in turns)


def _spread(sizes: Iterable[int]) -> Spread:
    ordered = sorted(sizes)
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return Spread(statistics.median_high(ordered), p95, ordered[-1])


def data_check(
    source: Annotated[str, typer.Argument(metavar="SOURCE[:PATH]", help="A source or a JSONL file.")],
) -> None:
    """Describe a source or file, and name every bad row."""
    raise typer.Exit(check(source))
