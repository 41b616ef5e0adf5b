"""Fuzzing: any content of a data file or a recipe is read, or refused with a message.

There are 10,000 cases, of which `make test` draws a fifth.

The cases are the same in every run; `PERL_FUZZ=20` draws 20 times as many, different ones each time.
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perl.commands.data import check
from perl.data.jsonl import MAX_MARGIN, read_values
from perl.data.records import Comparison, Demonstration, Problem, Rating, Turn
from perl.data.rows import line_value, parsed
from perl.data.sources import load_records
from perl.data.taskmaster import Domain, rated_turn, read_taskmaster, whole_dialogue
from perl.errors import UserError
from perl.recipe import Recipe, load_recipe
from perl.stages.identity import settings_sha256
from tests.near_recipes import GOOD, OVERRIDES, YAML, near_recipes

TIMES = int(os.environ.get("PERL_FUZZ", "1"))
Cases = st.SearchStrategy[Any]
_share = 1.0
"""Share of the cases that are drawn."""


@pytest.fixture(params=[0.2, pytest.param(1.0, marks=pytest.mark.slow)], ids=["a fifth", "all"], autouse=True)
def _some(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw all cases if time does not matter."""
    monkeypatch.setattr(sys.modules[__name__], "_share", request.param)


def fuzz(count: int, cases: Cases, read: Callable[[Any], bool], least: float) -> None:
    """Read `count` cases. `read` returns whether a case was accepted; at least `least` must be, and not all."""
    count = round(count * _share * TIMES)
    seen = accepted = 0

    @settings(
        max_examples=count,
        derandomize=TIMES == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def one(case: Any) -> None:
        nonlocal seen, accepted
        seen += 1
        accepted += read(case)

    one()
    assert seen >= count
    assert int(least * seen) <= accepted < seen, f"{accepted} of {seen} accepted: the cases are all of one kind"


WORDS = st.text("abé{\t", min_size=1, max_size=4)
TEXTS = st.text("a \0\ud800é", max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, texts: Cases) -> bytes:
    """Draw a text's bytes with a part replaced by other bytes."""
    content: bytes = draw(texts).encode("utf-8", "surrogatepass")
    ends = st.integers(0, len(content))
    begin, end = sorted((draw(ends), draw(ends)))
    return content[:begin] + draw(st.binary(max_size=3)) + content[end:]


# Rows in own formats.


def messages(role: str, most: int) -> Cases:
    return st.lists(st.fixed_dictionaries({"role": st.just(role), "content": WORDS}), min_size=1, max_size=most)


CHATS = st.tuples(messages("user", 3), messages("assistant", 2)).map(lambda both: both[0] + both[1])
PROMPTS = WORDS | messages("user", 2) | CHATS
ANSWERS = WORDS | messages("assistant", 1)
CHANCES = st.booleans() | st.floats(0, 1)
GOOD_ROWS = st.one_of(
    st.fixed_dictionaries({"prompt": PROMPTS}, optional={"dialogue": WORDS, "more": VALUES}),
    st.fixed_dictionaries({"prompt": PROMPTS, "completion": ANSWERS}, optional={"label": CHANCES}),
    st.fixed_dictionaries(
        {"chosen": ANSWERS, "rejected": ANSWERS},
        optional={"prompt": PROMPTS, "margin": CHANCES, "probability": CHANCES},
    ),
    st.fixed_dictionaries({"messages": CHATS}),
)
FIELDS = "messages prompt completion label chosen rejected dialogue margin probability more"
CHANGES = st.dictionaries(st.sampled_from(FIELDS.split()), TEXTS | PROMPTS | VALUES | st.floats(0, 1), max_size=1)
ROWS = st.builds(lambda row, changes: {**row, **changes}, GOOD_ROWS, CHANGES)
LINES = (ROWS | VALUES).map(json.dumps)


def parse(line: bytes) -> bool:
    records = read_values("f", [(1, lambda: line_value(line))], {})
    if records.problems:
        (problem,) = records.problems
        assert problem.where == "f:1"
        assert problem.what
        return False
    rows = list(records.rows())
    assert rows
    for record in rows:
        assert_usable(record.context)
        assert record.dialogue == record.dialogue.encode().decode()
        if isinstance(record, Rating):
            assert isinstance(record.label, bool)
            assert record.probability is None or (0 < record.probability < 1)
            assert record.answer.text.strip()
        if isinstance(record, Comparison):
            assert 0.5 <= record.probability <= 1
            assert 0 <= record.margin <= MAX_MARGIN
    return True


def assert_usable(turns: tuple[Turn, ...]) -> None:
    for turn in turns:
        assert "\0" not in turn.text
        turn.text.encode()


def test_any_row_gives_records_or_a_problem() -> None:
    fuzz(1500, LINES.map(str.encode), parse, least=0.2)


def test_any_line_gives_records_or_a_problem() -> None:
    fuzz(1500, damaged(LINES) | st.binary(), parse, least=0.02)


def test_any_file_is_described_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"

    def read(content: bytes) -> bool:
        file.write_bytes(content)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                return check(str(file)) == 0
        except UserError as error:
            return refused(error)

    files = st.lists(LINES.map(str.encode) | damaged(LINES) | st.binary(), max_size=4).map(b"\n".join)
    fuzz(500, files, read, least=0.02)


def refused(error: UserError) -> bool:
    """Check the message and return False."""
    assert error.status == 2
    assert error.what
    assert error.remedy
    assert len(str(error)) < 3000
    return False


# Taskmaster's rows, and those of the public preference sets.

OBJECTS = st.dictionaries(WORDS, VALUES, max_size=2)


def mostly(good: Cases) -> Cases:
    """Draw an arbitrary value one time in fifty, so that most rows have at most one error."""
    return st.integers(0, 49).flatmap(lambda n: good if n else VALUES)


def fields(**values: Cases) -> Cases:
    return mostly(st.fixed_dictionaries({name: mostly(value) for name, value in values.items()}))


CALLS = fields(role=st.just("agent"), api=st.dictionaries(WORDS, OBJECTS, min_size=1, max_size=1))
REPLIES = fields(role=st.just("agent"), text=WORDS) | CALLS
TURNS = REPLIES | fields(role=st.just("user"), text=WORDS) | fields(role=st.just("api"), response=OBJECTS)
RATED = fields(
    context=st.lists(TURNS, max_size=3).map(json.dumps),
    generation=REPLIES.map(json.dumps),
    reward=st.sampled_from([0.0, 1.0]),
)
PARTS = ["api_call", "request", "api_response", "response"]
EXCHANGE = st.tuples(*(fields(name=st.just(part), value=WORDS | OBJECTS.map(json.dumps)) for part in PARTS)).map(
    list
)
UTTERANCES = fields(speaker=st.sampled_from(["user", "assistant"]), text=WORDS, annotations=EXCHANGE | st.just([]))
DIALOGUES = fields(utterances=st.lists(UTTERANCES, min_size=1, max_size=3))


def understood(parsed: Rating | Demonstration | Problem) -> bool:
    if isinstance(parsed, Problem):
        assert parsed.where == "f[0]"
        assert parsed.what
        return False
    answer = (parsed.answer,) if isinstance(parsed, Rating) else parsed.answer
    assert_usable((*parsed.context, *answer))
    assert any(turn.speaker == "agent" for turn in answer)
    assert parsed.dialogue.startswith("coffee:")
    return True


def test_any_rated_turn_is_read_or_a_problem() -> None:
    fuzz(1500, RATED | VALUES, lambda row: understood(parsed("f[0]", rated_turn, row, "coffee")), least=0.1)


def test_any_dialogue_is_read_or_a_problem() -> None:
    fuzz(
        1000, DIALOGUES | VALUES, lambda row: understood(parsed("f[0]", whole_dialogue, row, "coffee")), least=0.05
    )


@pytest.mark.parametrize("domain", ["coffee", "ticketing"])
def test_any_taskmaster_files_are_read_or_refused(domain: Domain, tmp_path: Path) -> None:
    release = tmp_path / {"coffee": "TM-4-2024", "ticketing": "TM-3-2020"}[domain]
    for part in ("reward", "data"):
        (release / part).mkdir(parents=True)

    def read(contents: tuple[bytes, bytes]) -> bool:
        for part, content in zip(("reward", "data"), contents, strict=True):
            (release / part / "00.json").write_bytes(content)
        try:
            return bool(read_taskmaster(tmp_path, domain, every_row=True).ratings)
        except UserError as error:
            return refused(error)

    def files(rows: Cases) -> Cases:
        text = st.lists(rows, min_size=1, max_size=3).map(json.dumps)
        whole = text.map(str.encode)
        return whole | whole | whole | damaged(text) | st.binary()

    fuzz(500, st.tuples(files(RATED), files(DIALOGUES)), read, least=0.002)


HH = st.builds(
    lambda asked, better, worse: {"chosen": f"{asked} {better}", "rejected": f"{asked} {worse}"},
    st.lists(st.builds("\n\nHuman: {}\n\nAssistant:".format, WORDS), min_size=1, max_size=2).map("".join),
    mostly(WORDS),
    mostly(WORDS),
)
SHP = fields(post_id=WORDS, history=WORDS, human_ref_A=WORDS, human_ref_B=WORDS, labels=st.integers(0, 1))
TLDR = fields(
    info=fields(id=WORDS, subreddit=WORDS, title=WORDS, post=WORDS),
    summaries=st.lists(fields(text=WORDS), min_size=2, max_size=2),
    choice=st.integers(0, 1),
)


@pytest.mark.parametrize(("name", "rows"), [("hh-rlhf", HH), ("shp", SHP), ("tldr", TLDR)])
def test_any_file_of_a_public_set_is_read_or_refused(name: str, rows: Cases, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    lines = (rows | rows | rows | VALUES).map(json.dumps)

    def read(content: bytes) -> bool:
        file.write_bytes(content)
        try:
            records = load_records(name, str(file), seed=0)
        except UserError as error:
            return refused(error)
        for record in records.comparisons:
            assert_usable((*record.context, record.better, record.worse))
        return not records.problems

    files = st.lists(lines.map(str.encode) | damaged(lines), min_size=1, max_size=3).map(b"\n".join)
    fuzz(500, files, read, least=0.01)


# Recipes.


def load(folder: Path, content: bytes, overrides: list[str]) -> bool:
    file = folder / "recipe.yaml"
    file.write_bytes(content)
    try:
        recipe = load_recipe(file, overrides)
    except UserError as error:
        return refused(error)
    assert isinstance(recipe, Recipe)
    assert all(len(settings_sha256(recipe, stage)) == 64 for stage in recipe.stages)
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(file) == recipe
    return True


def test_any_text_is_no_recipe_and_refused(tmp_path: Path) -> None:
    fuzz(
        1500,
        YAML.map(lambda text: text.encode("utf-8", "surrogatepass")),
        lambda c: load(tmp_path, c, []),
        least=0,
    )


def test_any_near_recipe_is_read_or_refused(tmp_path: Path) -> None:
    fuzz(1000, near_recipes().map(str.encode), lambda content: load(tmp_path, content, []), least=0.05)


def test_any_damaged_recipe_is_read_or_refused(tmp_path: Path) -> None:
    good = st.just(yaml.dump(GOOD))
    fuzz(500, damaged(good), lambda content: load(tmp_path, content, []), least=0.02)


def test_any_override_is_taken_or_refused(tmp_path: Path) -> None:
    good = yaml.dump(GOOD).encode()
    fuzz(500, st.lists(OVERRIDES, max_size=2), lambda overrides: load(tmp_path, good, overrides), least=0.02)
