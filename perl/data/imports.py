"""Ratings exported by other programs, as rows of `perl.data.jsonl`.

open-webui: the JSON of Admin Panel, Evaluations, Feedbacks, Export.
gradio: the log.csv of a ChatInterface with flagging.
trl: a data set in TRL's formats, as a file of Parquet, JSON or JSON Lines.
csv: a table whose columns the user names.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from perl.data.jsonl import parse_row
from perl.data.records import Problem
from perl.data.rows import (
    Row,
    RowError,
    line_value,
    list_of,
    numbered_lines,
    object_with,
    parsed,
    shown,
    strict_json,
    usable_text,
)
from perl.data.tables import parquet_rows
from perl.errors import UserError, machine_fault

_WORDS = {
    **dict.fromkeys(("1", "1.0", "true", "yes", "up", "like", "liked", "good", "👍"), True),
    **dict.fromkeys(("0", "0.0", "-1", "-1.0", "false", "no", "down", "dislike", "disliked", "bad", "👎"), False),
}
"""What ratings are called in tables, whatever the case."""


@dataclass(frozen=True)
class Columns:
    """The names of a table's columns."""

    prompt: str = "prompt"
    completion: str = "completion"
    label: str = "label"
    chosen: str = "chosen"
    rejected: str = "rejected"


def read_import(source: str, file: Path, columns: Columns) -> Iterator[Row | Problem]:
    """The rows of a file, and what is wrong with those that cannot be used.

    Args:
        source: in `FORMATS`.
        columns: of a table.

    Raises:
        UserError: the file is not of this format, or cannot be read.
    """
    try:
        for where, value in _values(source, file):
            yield parsed(where, _usable, FORMATS[source], value, columns)
    except (OSError, UnicodeDecodeError, RowError, csv.Error) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        remedy = f"Name a file of the format {source}: data/README.md has them."
        what = f"cannot be read: {cause}"
        raise machine_fault(error) or UserError(what, where=str(file), remedy=remedy) from None


def _usable(convert: Callable[[object, Columns], Row], value: object, columns: Columns) -> Row:
    """A row that `data.source: jsonl` takes. Raises `RowError`."""
    row = convert(value, columns)
    parse_row(row)
    return row


def _values(source: str, file: Path) -> Iterator[tuple[str, object]]:
    """The rows as the file has them, and where each stands."""
    if source in ("gradio", "csv"):
        yield from _table(file, file.read_text(encoding="utf-8-sig"))
    elif source == "trl" and file.suffix == ".parquet":
        yield from _numbered(file, parquet_rows(file))
    elif file.suffix in (".jsonl", ".gz"):
        yield from ((f"{file}:{number}", line) for number, line in numbered_lines(file))
    else:
        yield from _numbered(file, list_of(strict_json(file.read_text(encoding="utf-8-sig")), "the file"))


def _numbered(file: Path, rows: Iterable[object]) -> Iterator[tuple[str, object]]:
    return ((f"{file}[{index}]", row) for index, row in enumerate(rows))


def _table(file: Path, text: str) -> Iterator[tuple[str, object]]:
    """The rows of a CSV file by the names in its first; of `_whole` to be checked."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = next(reader, [])
    for cells in filter(None, reader):  # a blank line has no cells
        yield f"{file}:{reader.line_num}", dict(zip_longest(_header(header, cells), cells))


def _whole(value: object, fields: Iterable[str]) -> dict[str, str]:
    """A table's row that has these columns, and a cell in each. Raises `RowError`."""
    cells = object_with(value, fields, "the table")
    if None in cells or None in cells.values():
        raise RowError("has more cells than the header, or fewer: a text with commas has to be in quotes")
    return {name: str(cell) for name, cell in cells.items()}


def _header(header: list[str], cells: list[str]) -> list[str]:
    """The names of a row's cells.

    gradio writes a header of five names above the four cells of a chat: there never was a cell for `value`.
    """
    if header == ["conversation", "index", "value", "flag", "timestamp"] and len(cells) == len(header) - 1:
        return ["conversation", "index", "flag", "timestamp"]
    return header


def _open_webui(value: object, columns: Columns) -> Row:
    """A thumb on a message: its conversation is the path to it in the tree of messages."""
    feedback = object_with(value, ("data", "meta", "snapshot"))
    data, meta = (object_with(feedback[name], name=name) for name in ("data", "meta"))
    rating = str(data.get("rating"))
    if rating not in ("1", "-1"):
        raise RowError(f"data.rating is {shown(data.get('rating'))}; 1 or -1 expected")
    chat = object_with(
        object_with(feedback["snapshot"], ("chat",), "snapshot")["chat"], ("chat",), "snapshot.chat"
    )
    inner = object_with(chat["chat"], ("history",), "snapshot.chat.chat")
    history = object_with(inner["history"], ("messages",), "history")
    messages = object_with(history["messages"], name="history.messages")
    path: list[dict[str, object]] = []
    identity = meta.get("message_id")
    while identity is not None:
        if not isinstance(identity, str) or identity not in messages or len(path) > len(messages):
            raise RowError(f"history.messages lacks {shown(identity)}, or leads in a circle")
        message = object_with(messages[identity], ("role", "content"), f"message {identity}")
        path.append({"role": message["role"], "content": _content(message["content"])})
        identity = message.get("parentId")
    if not path or path[0]["role"] != "assistant":
        raise RowError(f"meta.message_id is {shown(meta.get('message_id'))}; a message by the assistant expected")
    answer, *before = path
    more = {name: data[name] for name in ("reason", "comment", "model_id") if data.get(name)}
    dialogue = {"dialogue": meta["chat_id"]} if isinstance(meta.get("chat_id"), str) else {}
    row = {"prompt": before[::-1], "completion": answer["content"], "label": rating == "1"}
    return {**row, **more, **dialogue, "rater": feedback.get("user_id"), "time": feedback.get("updated_at")}


def _gradio(value: object, columns: Columns) -> Row:
    """A thumb on a message of a chat; `index` is the message's, alone or twice in a list."""
    cells = _whole(value, ("conversation", "index", "flag"))
    turns = list_of(strict_json(cells["conversation"].removeprefix("'")), "conversation")
    index = strict_json(cells["index"].removeprefix("'"))
    if isinstance(index, list) and index:
        index = index[0]
    if not isinstance(index, int) or not 0 < index < len(turns):
        raise RowError(f"index is {shown(cells['index'])}; that of a message after the first expected")
    path = [object_with(turn, ("role", "content"), "a message") for turn in turns[: index + 1]]
    *before, answer = ({"role": turn["role"], "content": _content(turn["content"])} for turn in path)
    if answer["role"] != "assistant":
        raise RowError(f"message {index} is by {shown(answer['role'])}; one by the assistant expected")
    row = {"prompt": before, "completion": answer["content"], "label": _label(cells["flag"], "flag")}
    return {**row, "time": cells.get("timestamp")}


def _trl(value: object, columns: Columns) -> Row:
    """As it is: `perl.data.jsonl` reads TRL's formats."""
    return object_with(line_value(value) if isinstance(value, bytes) else value)


def _csv(value: object, columns: Columns) -> Row:
    """A rating, a comparison, a demonstration or a prompt, by which of the columns the table has."""
    asked = (column for name, column in vars(columns).items() if column != name or name == "prompt")
    cells = _whole(value, dict.fromkeys(asked))
    names = {column: name for name, column in vars(columns).items() if column in cells}
    others = set(cells) - set(names.values())  # a column that is asked for takes the place of one of the name
    row = {names.get(column, column): _cell(cell) for column, cell in cells.items() if column in {*names, *others}}
    if "label" in row:
        row["label"] = _label(cells[columns.label], columns.label)
    return row


def _cell(cell: str) -> object:
    """A cell's text, or the messages that it holds as JSON."""
    if cell.startswith('[{"'):
        return strict_json(cell)
    return cell


def _label(value: object, name: str) -> bool | float:
    """A rating in words or numbers; a number between 0 and 1 is the probability of up."""
    word = str(value).strip().casefold()
    if word in _WORDS:
        return _WORDS[word]
    try:
        return float(word)
    except ValueError:
        raise RowError(f"{name} is {shown(value)}; a rating such as {shown(list(_WORDS))} expected") from None


def _content(content: object) -> object:
    """A message's text, from parts of text where chat programs divide it."""
    if not isinstance(content, list):
        return content
    parts = [object_with(part, ("type",), "a part of the content") for part in content]
    if any(part["type"] != "text" for part in parts):
        raise RowError("the message holds more than text")
    return "".join(usable_text(part.get("text"), "a part of the content") for part in parts)


FORMATS: dict[str, Callable[[object, Columns], Row]] = {
    "open-webui": _open_webui,
    "gradio": _gradio,
    "trl": _trl,
    "csv": _csv,
}
"""What reads a row of each format."""
