"""Reads GSM8K and the test sets of LLM-Adapters (Hu et al. 2023) in their published formats.

Every row is a prompt whose column `answer` has the reference, and also a demonstration if its own solution has
that answer. The solutions of LLM-Adapters were written by a language model; many are wrong, and these are listed.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from perl.data.answers import AnswerKind, is_right, reference_problem
from perl.data.fetch import GSM8K, LLM_ADAPTERS, Repository
from perl.data.records import Demonstration, Problem, Prompt, Records, Turn
from perl.data.rows import Row, RowError, line_value, numbered_lines, object_with, parsed, sifted, usable_text
from perl.errors import UserError

_CALCULATOR = re.compile("<<[^>]*>>")


@dataclass(frozen=True, slots=True)
class Question:
    """A row: the question, the reference answer, and the row's own solution, empty if it has none."""

    text: str
    answer: str
    solution: str


def _gsm8k(row: Row) -> Question:
    """Convert a row; calculator annotations, as in `48/2 = <<48/2=24>>24`, are removed from its solution."""
    solution = _CALCULATOR.sub("", usable_text(row["answer"], "answer"))
    return Question(usable_text(row["question"], "question"), solution.rpartition("#### ")[2], solution)


def _llm_adapters(row: Row) -> Question:
    texts = (usable_text(row[field], field).strip() for field in ("instruction", "answer", "output"))
    return Question(*texts)


def _mawps(row: Row) -> Question:
    return Question(usable_text(row["original_text"], "original_text"), str(row["ans"]), "")


@dataclass(frozen=True, slots=True)
class MathSet:
    """Where a set is published, and how to read its rows.

    Attributes:
        folder: its folder in the repository.
        files: its files in that folder.
        fields: the fields that a row must have, which `question` reads.
        kind: the kind of its answers.
    """

    description: str
    licence: str
    repository: Repository
    folder: str
    files: tuple[str, ...]
    fields: tuple[str, ...]
    question: Callable[[Row], Question]
    kind: AnswerKind = "number"


def _test_set(name: str, description: str, kind: AnswerKind = "number") -> MathSet:
    fields = ("instruction", "output", "answer")
    description = f"{description}, a test set"
    return MathSet(
        description, "ODC-By", LLM_ADAPTERS, f"dataset/{name}", ("test.json",), fields, _llm_adapters, kind
    )


MATH_SETS = {
    "gsm8k": MathSet(
        "word problems of two to eight steps",
        "MIT",
        GSM8K,
        "grade_school_math/data",
        ("train.jsonl", "test.jsonl"),
        ("question", "answer"),
        _gsm8k,
    ),
    "aqua": _test_set("AQuA", "algebra with five choices", "letter"),
    "addsub": _test_set("AddSub", "addition and subtraction"),
    "multiarith": _test_set("MultiArith", "word problems of two steps"),
    "singleeq": _test_set("SingleEq", "word problems of one equation"),
    "svamp": _test_set("SVAMP", "word problems with varied wording"),
    "mawps": MathSet(
        "a training set that contains most of addsub, multiarith and singleeq",
        "ODC-By",
        LLM_ADAPTERS,
        "dataset/mawps",
        ("trainset.json",),
        ("original_text", "ans"),
        _mawps,
    ),
}
"""The sets by their names in `data.source`."""


def read_math(chosen: MathSet, path: Path) -> Records:
    """Read a set; if there is a training and a test file, the latter becomes `Records.published_test`.

    Args:
        path: a checkout of the repository, the folder with the files, or one file.

    Raises:
        UserError: a file is not a list of rows.
        OSError: a file cannot be read.
    """
    files = _files(chosen, path)
    parts = {file: sifted(_questions(chosen, file)) for file in files}
    rows = [(file, *row) for file, (found, _) in parts.items() for row in found]
    records = Records(problems=[problem for _, problems in parts.values() for problem in problems])
    if len(files) > 1:
        records.published_test = frozenset(one.text for file, _, one in rows if file.stem == "test")
    wrong: list[str] = []
    for file, where, one in rows:
        if file.stem != "test" and one.text in records.published_test:
            continue
        context = (Turn("user", one.text),)
        records.prompts.append(Prompt(context, one.text, {"answer": one.answer}))
        if one.solution and is_right(chosen.kind, one.solution, one.answer):
            records.demonstrations.append(Demonstration(context, (Turn("agent", one.solution),), one.text))
        elif one.solution:
            wrong.append(where)
    if wrong:
        records.notes.append(
            f"{len(wrong):,} of {len(rows):,} rows have a solution whose answer is not the row's own, and are not "
            f"used as demonstrations: {', '.join(wrong)}"
        )
    return records


def _files(chosen: MathSet, path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    inside = path / chosen.folder
    return [(inside if inside.is_dir() else path) / file for file in chosen.files]


def _questions(chosen: MathSet, file: Path) -> Iterator[tuple[str, Question] | Problem]:
    """Read the rows of a JSON Lines file or of a JSON list, with their places."""
    if file.suffix == ".jsonl":
        for number, line in numbered_lines(file):
            yield parsed(f"{file.name}:{number}", _question, chosen, f"{file.name}:{number}", line)
        return
    for index, value in enumerate(_list_in(file)):
        yield parsed(f"{file.name}[{index}]", _question, chosen, f"[{index}]", value)


def _list_in(file: Path) -> Sequence[object]:
    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:
        what = f"is not JSON: {error}"
        raise UserError(what, where=str(file), remedy="Download the published file again.") from None
    if not isinstance(values, list):
        raise UserError("is not a list of rows", where=str(file), remedy="Download the published file again.")
    return values


def _question(chosen: MathSet, where: str, value: object) -> tuple[str, Question]:
    row = object_with(line_value(value) if isinstance(value, bytes) else value, chosen.fields)
    question = chosen.question(row)
    if problem := reference_problem(chosen.kind, question.answer):
        raise RowError(f"the answer {question.answer[:40]!r} {problem}")
    return where, question
