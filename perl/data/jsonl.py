"""Reads the user's own files: rows in TRL's standard formats, as plain text or as chat messages.

    {"prompt": …, "completion": …}                    a demonstration
    {"messages": […]}                                 a demonstration: a whole conversation
    {"prompt": …, "completion": …, "label": true}     a rating
    {"prompt": …, "chosen": …, "rejected": …}         a comparison
    {"chosen": …, "rejected": …}                      a comparison; their common beginning is the prompt
    {"prompt": …}                                     a prompt

A `label` between 0 and 1 is the probability that the answer is rated up; its words are in `perl.data.rows`. A
comparison may have a `margin`, as in TRL, or the `probability` that `chosen` is better.

Of the rows that `perl-rlhf rate` has written, only those in force are read (`perl.data.rated`). Every row also
yields a prompt: its context, with the row's other fields as columns. A row that fits no format is a `Problem` and
is left out; only a file that cannot be used at all is an error.
"""

import json
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import Any, cast

from perl.data.rated import RATED, in_force, rated_of
from perl.data.records import (
    JSON,
    Comparison,
    Context,
    Demonstration,
    Problem,
    Prompt,
    Rating,
    Record,
    Records,
    Speaker,
    Turn,
    content_of,
)
from perl.data.rows import (
    Row,
    RowError,
    content_text,
    first_user_key,
    has_prompt_twice,
    kind,
    number_to,
    object_with,
    parsed,
    refuse_stars,
    shown,
    sifted,
    soft_label,
    usable_text,
)
from perl.data.tables import TRL_FORMATS, Value, mapping_hint, mapping_of, numbered_values
from perl.system.progress import counted

FORMATS = (
    '{"prompt", "completion"}, {"prompt", "completion", "label"}, '
    '{"prompt", "chosen", "rejected"}, {"messages"} or {"prompt"}'
)
"""The fields of a row, for messages."""
MAX_MARGIN = 1e6
"""Maximum margin. Margins are differences of scores; larger ones cannot be learned."""

_SPEAKERS: dict[str, Speaker] = {"system": "system", "user": "user", "assistant": "agent", "tool": "api"}
_SPEAKERS["developer"] = "system"  # OpenAI's newer name for it
_FIELDS = set[str]().union(*TRL_FORMATS)
_DIALOGUE_FIELDS = ("dialogue", "conversation_id")
_CERTAINTY_FIELDS = ("margin", "probability")
_HH_ANSWER = "\n\nAssistant:"  # in hh-rlhf's text conversations, the last answer begins after this


def read_jsonl(path: Path, columns: Mapping[str, str] | None = None) -> Records:
    """Read a file of rows in a form of `perl.data.tables`; `problems` has the rows left out, as `FILE:LINE`.

    Rows with the same context and columns share a prompt; `notes` counts copies among rows with only a prompt.

    Args:
        columns: the file's column names, by the field names of the formats above.

    Raises:
        UserError: the file's form is not supported, or it is broken.
        OSError: it cannot be read.
    """
    return read_values(str(path), numbered_values(path, columns or {}), columns or {})


def read_values(where: str, values: Iterable[tuple[int, Value]], columns: Mapping[str, str]) -> Records:
    """Return the records of numbered rows.

    Args:
        where: the place of the rows in messages, before their number.
        columns: the mapping of `read_jsonl`, which has been applied already.
    """
    names: Counter[str] = Counter()

    def parse(value: Value) -> tuple[str | None, list[Record]]:
        row = value()
        rated = rated_of(row)
        if rated is not None and rated.undone:
            return rated.id, []
        names.update(list(row) if isinstance(row, dict) else [])
        return None if rated is None else rated.id, parse_row(row, columns)

    written, problems = sifted(parsed(f"{where}:{number}", parse, value) for number, value in values)
    rows = in_force(written)
    refuse_stars(len(rows), problems)
    absent = [name for field, name in columns.items() if field not in names]
    hint = mapping_hint(mapping_of(names, len(rows) + len(problems)))
    if absent and names:
        hint = f"data.columns names {', '.join(absent)}, which no row has"
    if hint and not rows:
        problems = [Problem(one.where, f"{one.what}. {hint}") for one in problems]
    records, copies = Records(problems=problems), 0
    prompts: dict[Hashable, Prompt] = {}
    others: dict[type[Record], list[Any]]
    others = {Demonstration: records.demonstrations, Rating: records.ratings, Comparison: records.comparisons}
    for row in rows:
        for record in row:
            if isinstance(record, Prompt):
                key = content_of(record)
                copies += key in prompts and len(row) == 1
                prompts.setdefault(key, record)
            else:
                others[type(record)].append(record)
    records.prompts = list(prompts.values())
    if hint:
        records.notes.append(hint)
    if copies:
        records.notes.append(f"{counted(copies, 'row')} with only a prompt: copies of earlier prompts, left out")
    return records


def parse_row(value: object, names: Mapping[str, str] = {}) -> list[Record]:
    """Return the records of one row: the row itself, and its context as a prompt.

    Args:
        names: the user's names of the fields, for messages.

    Raises:
        RowError: the row fits no format.
    """
    row = object_with(value)
    if _FIELDS.intersection(row) - ({"messages"} if "chosen" in row else set()) not in TRL_FORMATS:
        raise RowError(f"the fields {shown(list(row))} fit no format")
    try:
        record = _record(row)
    except RowError as error:  # most messages begin with the name of the field
        raise RowError(re.sub(r"^\w+", lambda field: names.get(field[0], field[0]), str(error))) from None
    used = _FIELDS.union(_DIALOGUE_FIELDS, _CERTAINTY_FIELDS if isinstance(record, Comparison) else ())
    used |= {RATED} if rated_of(row) is not None else set()
    columns = {key: cast(JSON, value) for key, value in row.items() if key not in used}
    usable_text(json.dumps(columns, ensure_ascii=False), "another field")
    prompt = Prompt(record.context, record.dialogue, columns)
    if isinstance(record, Prompt):
        return [prompt]
    # A conversation that the assistant begins has no context to answer.
    return [record, prompt] if record.context else [record]


def _record(row: Row) -> Record:
    if "messages" in row and "chosen" not in row:
        return _conversation(row)
    if "prompt" not in row or has_prompt_twice(row):
        return _comparison_without_prompt(row)
    context = _context(row["prompt"])
    if "chosen" in row:
        return _comparison(row, context, row["chosen"], row["rejected"])
    dialogue = _dialogue(row, context)
    if "completion" not in row:
        return Prompt(context, dialogue)
    answer = _answer(row["completion"], "completion", context)
    if "label" not in row:
        return Demonstration(context, (answer,), dialogue)
    label = soft_label(row["label"], "label")
    return Rating(context, answer, label >= 0.5, dialogue, probability=label if 0 < label < 1 else None)


def _conversation(row: Row) -> Demonstration:
    turns = _messages(row["messages"], "messages")
    context = tuple(takewhile(lambda turn: turn.speaker != "agent", turns))
    answer = turns[len(context) :]
    if not any(turn.text.strip() for turn in answer if turn.speaker == "agent"):
        raise RowError('messages have no text by the assistant; for prompts alone write {"prompt": [...]}')
    return Demonstration(context, answer, _dialogue(row, turns))


def _comparison_without_prompt(row: Row) -> Comparison:
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = _shared_text(chosen, rejected)
        return _comparison(row, _context(chosen[:cut]), chosen[cut:], rejected[cut:])
    better, worse = _messages(chosen, "chosen"), _messages(rejected, "rejected")
    if better == worse:  # all of it would be the prompt
        raise RowError("chosen and rejected are the same")
    cut = _shared(better, worse)
    if not cut:
        raise RowError("chosen and rejected share no first message, and there is no prompt")
    return _comparison(row, better[:cut], better[cut:], worse[cut:])


def _comparison(row: Row, context: Context, chosen: object, rejected: object) -> Comparison:
    better = _answer(chosen, "chosen", context)
    worse = _answer(rejected, "rejected", context)
    if better == worse:
        raise RowError("both answers are the same")
    comparison = Comparison(context, better, worse, _dialogue(row, context))
    match [name for name in _CERTAINTY_FIELDS if row.get(name) is not None]:
        case ["margin"]:
            return replace(comparison, margin=number_to(MAX_MARGIN, row["margin"], "margin"))
        case ["probability"]:
            probability = number_to(1, row["probability"], "probability")
            if probability < 0.5:  # the more likely answer comes first
                comparison, probability = replace(comparison, better=worse, worse=better), 1 - probability
            return replace(comparison, probability=probability)
        case [_, _]:
            raise RowError("has both margin and probability, of which only one is allowed")
    return comparison


# The parts of a row.


def _context(value: object) -> Context:
    turns = (Turn("text", usable_text(value, "prompt")),) if isinstance(value, str) else _messages(value, "prompt")
    if not any(turn.text.strip() for turn in turns):
        raise RowError("prompt is empty")
    return turns


def _answer(value: object, name: str, context: Context) -> Turn:
    plain = context[0].speaker == "text"
    if isinstance(value, str):
        answer = Turn("text" if plain else "agent", usable_text(value, name))
    else:
        turns = value if isinstance(value, tuple) else _messages(value, name)
        if len(turns) != 1 or turns[0].speaker != "agent":
            roles = shown([turn.speaker for turn in turns])
            raise RowError(f"{name} has messages by {roles} after the prompt; one by the assistant expected")
        if plain:
            raise RowError(f"the prompt is plain text, but {name} is a list of messages")
        answer = turns[0]
    if not answer.text.strip():
        raise RowError(f"{name} is empty")
    return answer


def _messages(value: object, name: str) -> Context:
    if not isinstance(value, list):
        raise RowError(f"{name} is {kind(value)}; text or a list of messages expected")
    turns = (_message(message, f"{name}[{index}]") for index, message in enumerate(value))
    return tuple(turn for turn in turns if turn.text.strip())  # without empty system messages, which say nothing


def _message(message: object, name: str) -> Turn:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise RowError(f"{name} is {shown(message)}; an object with role and content expected")
    role = message["role"]
    speaker = _SPEAKERS.get(role) if isinstance(role, str) else None
    if speaker is None:
        raise RowError(f"{name} has the unknown role {shown(role)}; one of {', '.join(_SPEAKERS)} expected")
    text = content_text(message["content"], f"{name}.content")
    if not text.strip() and speaker != "system":
        raise RowError(f"{name}.content is empty")
    return Turn(speaker, text)


def _dialogue(row: Row, turns: Context) -> str:
    key = next((row[name] for name in _DIALOGUE_FIELDS if row.get(name) not in (None, "")), None)
    if key is None:
        return first_user_key(turns)
    if isinstance(key, float) and key.is_integer():  # pandas writes columns with missing integers as floats
        key = int(key)
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise RowError(f"dialogue is {kind(key)}; text or a whole number expected")
    return usable_text(str(key), "dialogue")


def _shared(one: Iterable[object], other: Iterable[object]) -> int:
    """Return the length of the common prefix of two sequences."""
    return sum(takewhile(bool, map(eq, one, other)))


def _shared_text(chosen: str, rejected: str) -> int:
    """Return where the prompt ends in two texts with a common beginning.

    TRL cuts at the first character that differs, which may be inside a word or inside the answer. Here the cut is
    where hh-rlhf's last answer begins, else before the last space.
    """
    prompt = chosen[: _shared(chosen, rejected)]
    before, marker, _ = prompt.rpartition(_HH_ANSWER)
    last_word = re.search(r"\s\S*\Z", prompt)
    return len(before + marker) if marker else last_word.start() if last_word else 0
