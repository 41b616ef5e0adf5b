"""`score`: score completions in a file with a run's reward model."""

from typing import TYPE_CHECKING

from perl.commands.json_lines import Lines, Out, has_empty_completion, read_records, write_lines
from perl.commands.options import Run, say_loading
from perl.data.records import Context, Demonstration, Rating, Record, Turn
from perl.errors import UserError
from perl.system.progress import console, counted

if TYPE_CHECKING:
    from perl.library import Score


def score(run: Run, file: Lines, out: Out = None) -> None:
    """Score a file of completions with the reward model: adds score, probability and confidence to each line.

    They are null where the completion is empty.
    """
    say_loading()
    from perl.library import load_run

    records = read_records(file)
    answered = [None if has_empty_completion(row) else _answered(where, one) for where, row, one in records]
    scores = iter(load_run(run).score_answers([one for one in answered if one is not None]))
    fields = [_fields(None if one is None else next(scores)) for one in answered]
    write_lines(out, ({**row, **more} for (_, row, _), more in zip(records, fields, strict=True)))
    if empty := answered.count(None):
        console.print(f"{counted(empty, 'completion')} without text: score null, since reward models learn none.")


def _answered(where: str, record: Record) -> tuple[Context, Turn]:
    """Return a record's last answer and what precedes it."""
    match record:
        case Rating():
            return record.context, record.answer
        case Demonstration():
            *before, last = (*record.context, *record.answer)
            if last.speaker in ("agent", "text") and before:
                return tuple(before), last
    remedy = 'Write {"prompt", "completion"}, or {"messages"} that end with an assistant message.'
    raise UserError("the line has no completion to score", where=where, remedy=remedy)


def _fields(one: "Score | None") -> dict[str, float | None]:
    if one is None:
        return dict.fromkeys(("score", "probability", "confidence"))
    fields: dict[str, float | None] = {
        "score": one.score,
        "probability": one.probability,
        "confidence": one.confidence,
    }
    return fields if one.disagreement is None else {**fields, "disagreement": one.disagreement}
