"""The file of ratings: an append-only log; a rating is reported as saved when it is on disk.

Its rows are those of `perl.data.jsonl` with a field `rated`; the last row of an `id` is valid (`perl.data.rated`).
An id stands for a rater, a question and a part, so rating the same question again replaces the rating.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from perl.data.jsonl import parse_row
from perl.data.rated import RATED, rated_of
from perl.data.rows import Row, RowError, line_value, usable_text
from perl.errors import UserError
from perl.rating.questions import Drawn, Question
from perl.rl.rewards.function import messages
from perl.system.files import flush, user_named
from perl.system.progress import console
from perl.system.typed_json import as_json, made

PARTS = ("rating", "pair")
"""Rows that one rating may write: a correction writes a demonstration and a pair."""


@dataclass(frozen=True)
class Opinion:
    """A rater's answer to a question: one of the three.

    Attributes:
        label: up or down, for a single completion.
        better: the better of two completions, 0 or 1.
        correction: what a single completion should have been.
    """

    label: bool | None = None
    better: int | None = None
    correction: str | None = None


@dataclass(frozen=True)
class Mark:
    """The field `rated` of a row.

    Attributes:
        question: the `Question.id`.
        time: in UTC, ISO 8601.
        shown: the completions in the order shown, with how they were sampled.
    """

    id: str
    question: str
    rater: str
    time: str
    chosen_by: str
    shown: list[Drawn]


@dataclass(frozen=True)
class Entry:
    """A valid row.

    Attributes:
        label: up or down; None for other rows.
        better: index of the better of two completions shown; None for other rows.
    """

    mark: Mark
    question: Question
    label: bool | None
    better: int | None


class RatingLog:
    """The ratings in a file that only this process appends to.

    Attributes:
        entries: the valid rows by id, the newest last.

    Raises:
        UserError: it cannot be written, another process uses it, or a row is not in the format written here.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.entries: dict[str, Entry] = {}
        with user_named(file):
            try:
                self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                remedy = "Rate there, or give another --out."
                raise UserError("another `rate` is writing this file", where=str(file), remedy=remedy) from None
            flush(file.absolute().parent)
            self._end_whole()
            lines = file.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if line.strip():
                self._read(line, f"{file}:{number}")

    def add(self, question: Question, rater: str, opinion: Opinion) -> None:
        """Append a rating; it replaces this rater's earlier rating of the question.

        Raises:
            UserError: the opinion does not match the question.
            MachineError: it could not be written; no part of it is in the file.
        """
        rows = _rows(question, opinion)
        mark = {"question": question.id, "rater": rater, "time": _now(), "chosen_by": question.chosen_by}
        mark["shown"] = as_json(question.completions)
        ids = [_id(question.id, rater, part) for part in PARTS]
        new = [{**row, RATED: {"id": key, **mark}} for key, row in zip(ids, rows, strict=False)]
        old = [key for key in ids[len(rows) :] if key in self.entries]
        self._append([*new, *self._undone(old)])

    def undo(self, rater: str) -> Question | None:
        """Undo a rater's last rating; return its question, or None if there is no rating."""
        last = next((one for one in reversed(self.entries.values()) if one.mark.rater == rater), None)
        if last is None:
            return None
        ids = (_id(last.mark.question, rater, part) for part in PARTS)
        self._append(self._undone([key for key in ids if key in self.entries]))
        return last.question

    def close(self) -> None:
        """Release the file for other processes."""
        os.close(self._descriptor)

    def _undone(self, ids: Sequence[str]) -> list[Row]:
        now = _now()
        return [
            {RATED: {"id": key, "rater": self.entries[key].mark.rater, "time": now, "undone": True}} for key in ids
        ]

    def _append(self, rows: Sequence[Row]) -> None:
        lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
        rest = memoryview(b"".join(line + b"\n" for line in lines))
        size = os.fstat(self._descriptor).st_size
        with user_named(self.file):
            try:
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
                os.fsync(self._descriptor)
            except OSError:
                os.ftruncate(self._descriptor, size)  # no part of it may remain
                raise
        for line in lines:
            self._read(line, str(self.file))

    def _end_whole(self) -> None:
        """Remove a truncated last line, which was never reported as saved."""
        before, _, last = self.file.read_bytes().rpartition(b"\n")
        if not last:
            return
        try:
            line_value(last)
            os.write(self._descriptor, b"\n")
        except RowError:
            console.print(f"{self.file}: the last line is incomplete and is removed", markup=False)
            os.ftruncate(self._descriptor, len(before) + bool(before))

    def _read(self, line: bytes, where: str) -> None:
        """Process a row; rows that were not written here stay in the file and are ignored."""
        try:
            row = line_value(line)
        except RowError:
            return
        rated = rated_of(row)
        if rated is None:
            return
        self.entries.pop(rated.id, None)
        if not rated.undone:
            assert isinstance(row, dict)
            self.entries[rated.id] = _entry(row, where)


def _entry(row: Mapping[str, Any], where: str) -> Entry:
    try:
        mark = made(Mark, row[RATED])
        record = parse_row({key: row[key] for key in ("prompt", "dialogue") if key in row})[0]
        if not mark.shown:
            raise RowError("rated.shown is empty")
    except (ValidationError, RowError) as error:
        what = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            what = f"{'.'.join(map(str, (RATED, *first['loc'])))}: {first['msg']}"
        remedy = "Fix or remove the line, or give another --out."
        raise UserError(f"is not a rating in the format of rate: {what}", where=where, remedy=remedy) from None
    question = Question(record.context, row.get("dialogue"), tuple(mark.shown), mark.chosen_by)
    texts = [one.text for one in mark.shown]
    better = texts.index(row["chosen"]) if len(texts) == 2 and row.get("chosen") in texts else None
    label = row.get("label")  # which may have been edited to a soft label
    up = label >= 0.5 if isinstance(label, bool | int | float) else None
    return Entry(mark, question, up, better)


def _rows(question: Question, opinion: Opinion) -> list[Row]:
    """Return rows in TRL's formats, in the order of `PARTS`. Raises `UserError`."""
    start: Row = {"prompt": messages(question.context)}
    if question.dialogue is not None:
        start = {**start, "dialogue": question.dialogue}
    match opinion, [one.text for one in question.completions]:
        case Opinion(label=bool(label), better=None, correction=None), [text]:
            return [{**start, "completion": text, "label": label}]
        case Opinion(label=None, better=0 | 1 as better, correction=None), [_, _] as texts:
            return [{**start, "chosen": texts[better], "rejected": texts[1 - better]}]
        case Opinion(label=None, better=None, correction=str(correction)), [text]:
            _check_correction(correction, text)
            if question.context[-1].speaker == "text" and not correction[0].isspace():
                # The text field gives it without the space between prompt and completion.
                correction = text[: len(text) - len(text.lstrip())] + correction
            pair = {**start, "chosen": correction, "rejected": text}
            return [{**start, "completion": correction}, pair]
    what = "a single completion needs label or correction, two completions need better (0 or 1)"
    raise UserError(what, where="the rating", remedy="Give one of them.")


def _check_correction(correction: str, text: str) -> None:
    try:
        usable_text(correction, "it")
    except RowError as error:
        raise UserError(str(error), where="the correction", remedy="Type it again.") from None
    if correction.strip() in ("", text.strip()):
        what = "equals the completion" if correction.strip() else "is empty"
        raise UserError(what, where="the correction", remedy="Change the text, or rate it up or down.")


def _id(question: str, rater: str, part: str) -> str:
    return hashlib.blake2b(repr((question, rater, part)).encode(), digest_size=8).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
