"""Converts ratings exported by other programs to rows of `perl.data.jsonl`.

open-webui: the JSON of Admin Panel, Evaluations, Feedbacks, Export.
gradio: the log.csv of a ChatInterface with flagging.
csv, trl: a table, or any file that `perl.data.tables` reads; the user may map its columns.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from perl.data.jsonl import parse_row
from perl.data.records import Problem
from perl.data.rows import (
    Row,
    RowError,
    content_text,
    list_of,
    object_with,
    parsed,
    shown,
    soft_label,
    strict_json,
)
from perl.data.tables import Value, csv_rows, numbered_values, row_of
from perl.errors import UserError, machine_fault


def read_import(source: str, file: Path, columns: Mapping[str, str]) -> Iterator[Row | Problem]:
    """Read the rows of a file, with a `Problem` in place of each row that cannot be used.

    Args:
        source: a name in `FORMATS`.
        columns: the table's column names, by the field names of TRL's formats.

    Raises:
        UserError: the file does not have this format, or cannot be read.
    """
    form, convert = FORMATS[source]
    values = _gradio_cells(file) if source == "gradio" else numbered_values(file, columns, form)
    try:
        for number, value in values:
            yield parsed(f"{file}:{number}", _usable, convert, value, columns)
    except OSError as error:
        remedy = f"Name a file in the format {source}, see data/README.md."
        what = f"cannot be read: {error.strerror}"
        raise machine_fault(error) or UserError(what, where=str(file), remedy=remedy) from None


def _usable(convert: Callable[[Row], Row], value: Value, columns: Mapping[str, str]) -> Row:
    """Return a row that `data.source: jsonl` accepts. Raises `RowError`."""
    row = convert(object_with(value()))
    parse_row(row, columns)
    return row


def _gradio_cells(file: Path) -> Iterator[tuple[int, Value]]:
    """Read the rows of a log; its header has five names for four cells, because `value` never has a cell."""
    for number, header, cells in csv_rows(file):
        names = [name for name in header if name != "value" or len(cells) == len(header)]
        yield number, lambda names=names, cells=cells: row_of(names, cells)  # type: ignore[misc]


def _open_webui(row: Row) -> Row:
    """Convert a thumb on a message; its conversation is the path to it in the tree of messages."""
    feedback = object_with(row, ("data", "meta", "snapshot"))
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
            raise RowError(f"history.messages lacks {shown(identity)}, or has a cycle")
        message = object_with(messages[identity], ("role", "content"), f"message {identity}")
        path.append({"role": message["role"], "content": content_text(message["content"], f"message {identity}")})
        identity = message.get("parentId")
    if not path or path[0]["role"] != "assistant":
        raise RowError(f"meta.message_id is {shown(meta.get('message_id'))}; a message by the assistant expected")
    answer, *before = path
    more = {name: data[name] for name in ("reason", "comment", "model_id") if data.get(name)}
    dialogue = {"dialogue": meta["chat_id"]} if isinstance(meta.get("chat_id"), str) else {}
    row = {"prompt": before[::-1], "completion": answer["content"], "label": rating == "1"}
    return {**row, **more, **dialogue, "rater": feedback.get("user_id"), "time": feedback.get("updated_at")}


def _gradio(row: Row) -> Row:
    """Convert a thumb on a message of a chat; `index` is the message's index, alone or twice in a list."""
    fields = ("conversation", "index", "flag")
    cells = {name: str(cell) for name, cell in object_with(row, fields).items()}
    turns = list_of(strict_json(cells["conversation"].removeprefix("'")), "conversation")
    index = strict_json(cells["index"].removeprefix("'"))
    if isinstance(index, list) and index:
        index = index[0]
    if not isinstance(index, int) or not 0 < index < len(turns):
        raise RowError(f"index is {shown(cells['index'])}; the index of a message after the first expected")
    path = [object_with(turn, ("role", "content"), "a message") for turn in turns[: index + 1]]
    *before, answer = (
        {"role": turn["role"], "content": content_text(turn["content"], "a message")} for turn in path
    )
    if answer["role"] != "assistant":
        raise RowError(f"message {index} is by {shown(answer['role'])}; one by the assistant expected")
    label = soft_label(cells["flag"], "flag")
    return {"prompt": before, "completion": answer["content"], "label": label, "time": cells.get("timestamp")}


FORMATS: dict[str, tuple[str, Callable[[Row], Row]]] = {
    "open-webui": (".json", _open_webui),
    "gradio": (".csv", _gradio),
    "trl": ("", object_with),
    "csv": (".csv", object_with),
}
"""For each format, its file suffix (empty: the file's own) and the function that converts a row."""
