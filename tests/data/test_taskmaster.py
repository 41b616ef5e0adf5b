"""Taskmaster: rendering of turns, odd rows, and the real files if they are next to the checkout."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl.data.pairs import pair_ratings
from perl.data.records import Problem, Rating, Turn
from perl.data.rows import RowError, parsed
from perl.data.splits import split
from perl.data.taskmaster import Domain, rated_turn, read_taskmaster, whole_dialogue
from perl.errors import UserError

EXAMPLES = int(os.environ.get("PERL_FUZZ_EXAMPLES", "100"))
REAL = Path(__file__).parents[2].parent / "shared" / "taskmaster"
DOMAINS: tuple[Domain, ...] = ("coffee", "ticketing")

HELLO = {"role": "agent", "text": "Welcome!"}
ASK = {"role": "user", "text": " A  Café Latte"}
CALL = {"role": "agent", "api": {"get_menu_items": {"query": "café", "n": 1}}}
RESPONSE = {"role": "api", "response": {"get_menu_items": {"items": [{"name": "Café"}]}}}


@pytest.fixture
def real() -> Path:
    if not REAL.is_dir():
        pytest.skip("the real Taskmaster files are not beside the checkout, in shared/taskmaster")
    return REAL


def row(context: object, generation: object, reward: object = 1.0) -> dict[str, Any]:
    return {"context": json.dumps(context), "generation": json.dumps(generation), "reward": reward}


def dialogue(*utterances: tuple[str, str, list[tuple[str, str]]]) -> dict[str, Any]:
    return {
        "utterances": [
            {"speaker": who, "text": text, "annotations": [{"name": n, "value": v} for n, v in marks]}
            for who, text, marks in utterances
        ]
    }


def test_a_rated_row_is_rendered_turn_by_turn() -> None:
    assert rated_turn(row([HELLO, ASK, CALL, RESPONSE], {"role": "agent", "text": "Here."}), "coffee") == Rating(
        context=(
            Turn("agent", "Welcome!"),
            Turn("user", " A  Café Latte"),
            Turn("agent", 'call get_menu_items {"query": "café", "n": 1}'),
            Turn("api", '{"get_menu_items":{"items":[{"name":"Café"}]}}'),
        ),
        answer=Turn("agent", "Here."),
        label=True,
        dialogue="coffee:a café latte",
    )


def test_an_empty_call_and_an_invalid_intent_are_kept() -> None:
    context = [ASK, {"role": "agent", "api": {"": {}}}, {"role": "api", "response": {"invalid_intent": {}}}]
    rating = rated_turn(row(context, CALL, 0.0), "ticketing")
    assert rating.context[1] == Turn("agent", "call  {}")
    assert rating.context[1].is_call
    assert rating.context[2] == Turn("api", '{"invalid_intent":{}}')
    assert (rating.label, rating.answer.is_call) == (False, True)
    assert rating.dialogue == "ticketing:a café latte"


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (None, "the row is null"),
        ({"context": "[]"}, "no generation, reward"),
        (row([], HELLO) | {"context": "[{]"}, "not JSON"),
        (row([], HELLO) | {"context": []}, "context is a list"),
        (row({}, HELLO), "context is an object"),
        (row([], ASK), "generation is by user"),
        (row([], HELLO, 0.5), "reward is 0.5"),
        (row([], HELLO, float("nan")), "reward is nan"),
        (row([{"role": "bot", "text": "a"}], HELLO), "context[0]"),
        (row([HELLO | CALL], HELLO), "context[0]"),
        (row([], {"role": "agent", "api": {"a": {}, "b": {}}}), "one api call"),
        (row([], {"role": "agent", "api": {"a": 1}}), "one api call"),
        (row([], {"role": "agent", "text": "a\0"}), "NUL"),
        (row([], HELLO) | {"context": "[" * 100_000 + "]" * 100_000}, "nested too deeply"),
    ],
)
def test_a_bad_rated_row_is_a_problem(bad: object, what: str) -> None:
    problem = parsed("f[3]", rated_turn, bad, "coffee")
    assert isinstance(problem, Problem)
    assert problem.where == "f[3]"
    assert what in problem.what


def test_calls_follow_the_utterance_that_caused_them() -> None:
    marks = [
        ("api_call", "show_menu"),  # no request: no arguments
        ("api_response", "show_menu"),
        ("response", '{"success": true}'),
        ("api_call", "get_addons"),
        ("request", '{"query":"milk"}'),
        ("api_response", "get_addons"),
        ("response", '{"name":"\tMilk"}'),  # a raw tab
    ]
    read = whole_dialogue(
        dialogue(("assistant", "Hi", []), ("user", "Menu", marks), ("assistant", "Ok", [])), "coffee"
    )
    assert read.context == (Turn("agent", "Hi"), Turn("user", "Menu"))
    assert [(turn.speaker, turn.text) for turn in read.answer] == [
        ("agent", "call show_menu {}"),
        ("api", '{"show_menu":{"success":true}}'),
        ("agent", 'call get_addons {"query": "milk"}'),
        ("api", '{"get_addons":{"name":"\\tMilk"}}'),
        ("agent", "Ok"),
    ]
    assert read.dialogue == "coffee:menu"


def test_a_request_and_a_response_that_are_not_json_stand_as_they_are() -> None:
    broken = '{"id": ""latte-1""}'
    marks = [("api_call", "add"), ("request", broken), ("api_response", "add"), ("response", broken)]
    read = whole_dialogue(dialogue(("user", "Latte", marks)), "coffee")
    assert [turn.text for turn in read.answer] == [f"call add {broken}", f'{{"add":{broken}}}']


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ([], "the row is a list"),
        ({}, "no utterances"),
        ({"utterances": {}}, "utterances is an object"),
        (dialogue(("user", "a", [])), "the agent says nothing"),
        (dialogue(("bot", "a", [])), "unknown speaker 'bot'"),
        (dialogue(("user", " ", [])), "utterances[0].text is empty"),
        (dialogue(("user", "a", [("response", "{}")])), "'response' out of place"),
        (dialogue(("user", "a", [("request", "{}")])), "'request' out of place"),
        (dialogue(("user", "a", [("other", "{}")])), "'other' out of place"),
    ],
)
def test_a_bad_dialogue_is_a_problem(bad: object, what: str) -> None:
    with pytest.raises(RowError) as error:
        whole_dialogue(bad, "coffee")
    assert what in str(error.value)


def write(release: Path, part: str, rows: object) -> None:
    (release / part).mkdir(parents=True, exist_ok=True)
    (release / part / f"{part}_00.json").write_text(json.dumps(rows))


def test_repeats_and_contradictions_are_left_out_for_training(tmp_path: Path) -> None:
    one, other, silent = ({"role": "agent", "text": text} for text in ("one", "other", ""))
    rows = [row([ASK], one), row([ASK], one), row([ASK], other, 1), row([ASK], other, 0), row([ASK], silent)]
    write(tmp_path / "TM-3-2020", "reward", [*rows, {"context": 1}])
    everything, records = (read_taskmaster(tmp_path, "ticketing", every) for every in (True, False))
    assert len(everything.ratings) == 5
    assert [rating.answer.text for rating in records.ratings] == ["one", ""]
    assert [demonstration.answer[0].text for demonstration in records.demonstrations] == ["one"]
    assert len(records.prompts) == 1
    assert records.problems[0].where.endswith("reward_00.json[5]")


def test_an_empty_context_is_no_prompt(tmp_path: Path) -> None:
    write(tmp_path / "TM-3-2020", "reward", [row([], HELLO)])
    records = read_taskmaster(tmp_path / "TM-3-2020", "ticketing")
    assert (len(records.ratings), len(records.prompts)) == (1, 0)


def test_folders_that_cannot_be_used_are_user_errors(tmp_path: Path) -> None:
    release = tmp_path / "TM-4-2024"
    with pytest.raises(UserError, match="no folder TM-4-2024/reward"):
        read_taskmaster(tmp_path, "coffee")
    write(release, "reward", [row([ASK], HELLO)])
    with pytest.raises(UserError, match="no folder TM-4-2024/data"):
        read_taskmaster(tmp_path, "coffee")
    with pytest.raises(UserError, match="no folder TM-3-2020/reward"):
        read_taskmaster(release, "ticketing")  # the other domain's folder
    (release / "data").mkdir()
    with pytest.raises(UserError, match="no usable row"):
        read_taskmaster(release, "coffee")


def test_a_broken_file_is_a_problem_and_the_others_are_read(tmp_path: Path) -> None:
    release = tmp_path / "TM-3-2020"
    write(release, "reward", [row([ASK], HELLO)])
    (release / "reward" / "reward_01.json").write_bytes(b'[{"context": "caf\xe9"')
    (release / "reward" / "reward_02.json").write_text('[{"context": ')
    records = read_taskmaster(release, "ticketing")
    assert len(records.ratings) == 1
    assert [Path(problem.where).name for problem in records.problems] == ["reward_01.json", "reward_02.json"]


whole = cache(read_taskmaster)
"""Computed once because it takes seconds; tests must not change it."""


@pytest.mark.parametrize(
    ("domain", "rows", "kept", "up", "groups", "majority"),
    [("coffee", 2582, 2381, 2203, 681, 0.853), ("ticketing", 2818, 2771, 468, 208, 0.834)],
)
def test_real_ratings(
    real: Path, domain: Domain, rows: int, kept: int, up: int, groups: int, majority: float
) -> None:
    everything = read_taskmaster(real, domain, every_row=True)
    assert len(everything.ratings) == rows
    assert everything.problems == []
    ups = sum(rating.label for rating in everything.ratings)
    assert ups == up
    assert max(ups, rows - ups) / rows == pytest.approx(majority, abs=5e-4)
    records = whole(real, domain)
    assert len(records.ratings) == kept
    assert len({rating.dialogue for rating in records.ratings}) == groups
    assert {prompt.context for prompt in records.prompts} == {r.context for r in records.ratings if r.context}
    assert len(pair_ratings(records.ratings)) == {"coffee": 364, "ticketing": 16}[domain]


def test_real_dialogues(real: Path) -> None:
    dialogues = read_taskmaster(real / "TM-4-2024", "coffee").demonstrations
    assert len(dialogues) == 3710
    turns = [turn for dialogue in dialogues for turn in dialogue.answer]
    calls = [turn.text.split(" ", 2) for turn in turns if turn.is_call]
    assert len(calls) == sum(turn.speaker == "api" for turn in turns) == 15_395
    broken = sum('""' in arguments for _, _, arguments in calls)
    assert broken == 28, "requests that are not JSON in the files as published"
    assert all(dialogue.context[-1].speaker == "user" for dialogue in dialogues)


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("seed", range(3))
def test_real_split_does_not_leak(real: Path, domain: Domain, seed: int) -> None:
    train, held = split(whole(real, domain), held_out=0.2, seed=seed)
    assert not first_user_turns(train.ratings) & first_user_turns(held.ratings)
    assert not {d.dialogue for d in train.demonstrations} & {r.dialogue for r in held.ratings}
    # No context on one side starts one on the other; those without a user turn do not identify a dialogue.
    beginnings = {r.context[:n] for r in train.ratings for n in range(1, len(r.context) + 1)}
    leaked = [r for r in held.ratings if has_user(r) and r.context in beginnings]
    assert leaked == []
    share = len(held.ratings) / (len(train.ratings) + len(held.ratings))
    assert 0.1 < share < 0.35


def has_user(rating: Rating) -> bool:
    return any(turn.speaker == "user" for turn in rating.context)


def first_user_turns(ratings: list[Rating]) -> set[str]:
    return {next(t.text for t in r.context if t.speaker == "user") for r in ratings if has_user(r)}


WORDS = st.text("ab\té{", min_size=1, max_size=4)
TEXTS = st.text("a \0\ud800", max_size=3)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
OBJECTS = st.dictionaries(WORDS, JSON_VALUES, max_size=2)


def mostly(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw an arbitrary value one time in fifty, so that most rows have at most one error."""
    return st.integers(0, 49).flatmap(lambda n: good if n else JSON_VALUES)


def fields(**values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return mostly(st.fixed_dictionaries({name: mostly(value) for name, value in values.items()}))


ANSWERS = fields(role=st.just("agent"), text=WORDS) | fields(
    role=st.just("agent"), api=st.dictionaries(WORDS, OBJECTS, min_size=1, max_size=1)
)
TURNS = ANSWERS | fields(role=st.just("user"), text=WORDS) | fields(role=st.just("api"), response=OBJECTS)
RATED = fields(
    context=st.lists(TURNS, max_size=3).map(json.dumps),
    generation=ANSWERS.map(json.dumps),
    reward=st.sampled_from([0.0, 1.0]),
)
VALUES = WORDS | OBJECTS.map(json.dumps)
PARTS = ["api_call", "request", "api_response", "response"]
EXCHANGE = st.tuples(*(fields(name=st.just(part), value=VALUES) for part in PARTS)).map(list)
UTTERANCES = fields(speaker=st.sampled_from(["user", "assistant"]), text=WORDS, annotations=EXCHANGE | st.just([]))
DIALOGUES = fields(utterances=st.lists(UTTERANCES, min_size=1, max_size=3))


@settings(max_examples=EXAMPLES, deadline=None)
@given(RATED | DIALOGUES | JSON_VALUES)
def test_any_row_gives_usable_records_or_a_problem(value: object) -> None:
    for read in (parsed("f[0]", rated_turn, value, "coffee"), parsed("f[0]", whole_dialogue, value, "coffee")):
        if isinstance(read, Problem):
            assert read.where == "f[0]"
            assert read.what
            continue
        answer = (read.answer,) if isinstance(read, Rating) else read.answer
        for turn in (*read.context, *answer):
            turn.text.encode()
        assert any(turn.speaker == "agent" for turn in answer)
        assert read.dialogue.startswith("coffee:")
