"""`score`: score completions in a file with a run's reward model."""

from typing import TYPE_CHECKING

from perl.commands.json_lines import Lines, Out, read_records, write_lines
from perl.commands.options import Run, say_loading
from perl.data.records import Context, Demonstration, Rating, Record, Turn
from perl.errors import UserError

if TYPE_CHECKING:
    from perl.library import Score


def score(run: Run, file: Lines, out: Out = None) -> None:
    """Score a file of completions with the reward model: adds score, probability and confidence to each line."""
    say_loading()
    from perl.library import load_run

    records = read_records(file)
    answered = [_answered(where, record) for where, _, record in records]
    scores = load_run(run).score_answers(answered)
    write_lines(out, ({**row, **_fields(one)} for (_, row, _), one in zip(records, scores, strict=True)))


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


def _fields(one: "Score") -> dict[str, float]:
    fields = {"score": one.score, "probability": one.probability, "confidence": one.confidence}
    return fields if one.disagreement is None else {**fields, "disagreement": one.disagreement}
