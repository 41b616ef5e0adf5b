"""Users' files: every format, every kind of bad row, and files that cannot be used."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from perl.data.jsonl import read_jsonl, read_values
from perl.data.pairs import pair_ratings, without_repeats
from perl.data.records import Comparison, Demonstration, Problem, Prompt, Rating, Record, Records, Turn
from perl.data.rows import MAX_LINE_BYTES, line_value
from perl.data.sources import load_records
from perl.errors import UserError

USER = {"role": "user", "content": "Hi  There"}
AGENT = {"role": "assistant", "content": "hello"}


def parse_line(line: bytes) -> list[Record] | Problem:
    """Return the records of one line, or its error."""
    records = read_values("f", [(1, lambda: line_value(line))], {})
    return records.problems[0] if records.problems else list(records.rows())


def parse(row: object) -> list[Record] | Problem:
    return parse_line(json.dumps(row).encode())


def read(tmp_path: Path, *rows: object) -> Records:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_jsonl(path)


def test_plain_text_becomes_text_turns() -> None:
    text = (Turn("text", "Q: a?"),)
    rating, prompt = parse({"prompt": "Q: a?", "completion": " b", "label": 0})
    assert rating == Rating(text, Turn("text", " b"), False, "q: a?")
    assert prompt == Prompt(text, "q: a?")
    assert parse({"prompt": "Q: a?", "completion": " b"})[0] == Demonstration(text, (Turn("text", " b"),), "q: a?")
    assert parse({"prompt": "Q: a?", "chosen": " b", "rejected": " c"})[0] == Comparison(
        text, Turn("text", " b"), Turn("text", " c"), "q: a?"
    )


def test_chat_messages_become_turns_by_their_speakers() -> None:
    tool = {"role": "tool", "content": "{}"}
    system = {"role": "system", "content": "Be kind."}
    rating, _ = parse({"prompt": [system, USER, AGENT, tool], "completion": [AGENT], "label": True})
    assert [turn.speaker for turn in rating.context] == ["system", "user", "agent", "api"]
    assert rating.answer == Turn("agent", "hello")
    assert rating.label is True
    assert rating.dialogue == "hi there", "the first user turn, not the system's"


def test_content_in_parts_and_the_role_developer_are_read_as_in_openais_api() -> None:
    parts = [{"type": "text", "text": "Hi  "}, {"type": "text", "text": "There", "image": None}]
    row = {"messages": [{"role": "developer", "content": "Be kind."}, {**USER, "content": parts}, AGENT]}
    demonstration, prompt = parse(row)
    assert prompt.context == (Turn("system", "Be kind."), Turn("user", "Hi  There"))
    assert demonstration.answer == (Turn("agent", "hello"),)
    for content in ([*parts, {"type": "image"}], [{"type": "text"}], []):
        assert isinstance(parse({"prompt": [{"role": "user", "content": content}]}), Problem)


@pytest.mark.parametrize("content", ["", " \n", []])
def test_an_empty_system_message_is_left_out(content: object) -> None:
    empty = {"role": "system", "content": content}
    assert parse({"prompt": [empty, USER]})[0].context == (Turn("user", "Hi  There"),)
    demonstration, _ = parse({"messages": [empty, USER, AGENT]})
    assert demonstration.context == (Turn("user", "Hi  There"),)
    assert isinstance(parse({"prompt": [empty]}), Problem)


def test_a_text_completion_of_a_chat_is_the_agents() -> None:
    assert parse({"prompt": [USER], "completion": "hello"})[0].answer == (Turn("agent", "hello"),)


def test_a_conversation_is_context_up_to_the_first_assistant_message() -> None:
    demonstration, prompt = parse({"messages": [USER, AGENT, USER, AGENT]})
    assert demonstration.context == prompt.context == (Turn("user", "Hi  There"),)
    assert [turn.speaker for turn in demonstration.answer] == ["agent", "user", "agent"]


def test_a_conversation_the_assistant_opens_has_no_prompt() -> None:
    (demonstration,) = parse({"messages": [AGENT, USER, AGENT]})
    assert demonstration.context == ()
    assert demonstration.dialogue == "hi there"


def test_implicit_prompts_of_conversations() -> None:
    other = {"role": "assistant", "content": "go away"}
    comparison, prompt = parse({"chosen": [USER, AGENT, USER, AGENT], "rejected": [USER, AGENT, USER, other]})
    assert len(comparison.context) == 3
    assert (comparison.better.text, comparison.worse.text) == ("hello", "go away")
    assert prompt.context == comparison.context


def test_a_prompt_that_the_messages_repeat_is_read_once() -> None:
    """Rows of UltraFeedback repeat the prompt, and their `messages` equal `chosen`."""
    text, other = USER["content"], {"role": "assistant", "content": "go away"}
    row = {"prompt": text, "chosen": [USER, AGENT], "rejected": [USER, other], "messages": [USER, AGENT]}
    assert parse({**row, "score_chosen": 8})[0] == parse({"chosen": [USER, AGENT], "rejected": [USER, other]})[0]
    assert parse({**row, "score_chosen": 8})[1].columns == {"score_chosen": 8}


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "answers"),
    [
        ("Sky? Blue.", "Sky? Green.", "Sky?", (" Blue.", " Green.")),
        ("It is nine", "It is nil", "It is", (" nine", " nil")),  # not inside a word
        ("\n\nHuman: a?\n\nAssistant: I am", "\n\nHuman: a?\n\nAssistant: I was", None, (" I am", " I was")),
    ],
)
def test_implicit_prompts_of_texts(
    chosen: str, rejected: str, prompt: str | None, answers: tuple[str, str]
) -> None:
    comparison = parse({"chosen": chosen, "rejected": rejected})[0]
    assert (comparison.better.text, comparison.worse.text) == answers
    assert comparison.context[0].text == (prompt or "\n\nHuman: a?\n\nAssistant:")


def test_further_fields_are_columns_and_a_dialogue_is_the_key() -> None:
    (prompt,) = parse({"prompt": "1+1", "answer": 2, "dialogue": "d7"})
    assert prompt == Prompt((Turn("text", "1+1"),), "d7", {"answer": 2})
    assert parse({"prompt": "1+1", "conversation_id": 12})[0].dialogue == "12"
    for no_value in (None, ""):
        row = {"prompt": "1+1", "dialogue": no_value}
        assert parse({**row, "conversation_id": "c"})[0].dialogue == "c"
        assert parse(row)[0].dialogue == "1+1"


def test_a_label_between_false_and_true_is_a_soft_one() -> None:
    labels = {value: parse({"prompt": "a", "completion": "b", "label": value})[0] for value in (0.0, 0.3, 0.5, 1)}
    assert {value: (row.label, row.probability) for value, row in labels.items()} == {
        0.0: (False, None),
        0.3: (False, 0.3),
        0.5: (True, 0.5),
        1: (True, None),
    }


def test_comparisons_have_margins_and_probabilities() -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "who": "me"}
    plain, prompt = parse(row)
    assert (plain.margin, plain.probability) == (0.0, 1.0)
    for more in ({"margin": None, "probability": None}, {"margin": 0}, {"probability": 1}):
        assert parse({**row, **more}) == [plain, prompt], "and the prompt's columns are those of any comparison"
    assert parse({**row, "margin": 2.5})[0] == replace(plain, margin=2.5)
    assert parse({**row, "probability": 0.75})[0] == replace(plain, probability=0.75)
    likelier = parse({**row, "probability": 0.25})[0]
    assert (likelier.better.text, likelier.worse.text, likelier.probability) == ("c", "b", 0.75)
    assert parse({"prompt": "a", "margin": 3})[0].columns == {"margin": 3}, "of other rows it is a column"


def test_a_gzipped_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n\n{oops\n'))
    records = read_jsonl(path)
    assert len(records.prompts) == 1
    assert records.problems[0].where == f"{path}:3"


def test_the_examples_of_the_readme_are_what_it_says() -> None:
    readme = (Path(__file__).parents[2] / "data" / "README.md").read_text(encoding="utf-8")
    lines = readme.split("```json\n")[1].split("```")[0].splitlines()
    kinds = [type(parse_line(line.encode())[0]) for line in lines]
    compared = [Comparison] * 2
    assert kinds == [Demonstration, Demonstration, Rating, *compared, Prompt, Rating, *compared]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"prompt": "a', "not JSON"),
        (b"[1]", "the row is a list"),
        (b'{"completion": "a"}', "fit no format"),
        (b'{"prompt": "a", "label": true}', "fit no format"),
        (b'{"prompt": "a", "completion": "b", "label": true, "chosen": "c"}', "fit no format"),
        (b'{"prompt": 3}', "prompt is a number"),
        (b'{"prompt": null}', "prompt is null"),
        (b'{"prompt": " "}', "prompt is empty"),
        (b'{"prompt": []}', "prompt is empty"),
        (b'{"prompt": "a", "completion": ""}', "completion is empty"),
        (b'{"prompt": "a", "completion": "b", "label": NaN}', "NaN is not JSON"),
        (b'{"prompt": "a", "price": -1e999}', "-1e999 is too large a number"),
        (b'{"prompt": "a", "completion": "b", "label": 1e999}', "1e999 is too large a number"),
        (b'{"prompt": "a", "completion": "b", "label": 1.5}', "label is 1.5"),
        (b'{"prompt": "a", "completion": "b", "label": -0.1}', "label is -0.1"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": -1}', "margin is -1; a number from 0"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": true}', "margin is True"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1e999}', "1e999 is too large a number"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1' + b"0" * 400 + b"}", "margin is 1000"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"}', "margin is '1'"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c", "probability": 1.1}', "probability is 1.1; a number"),
        (
            b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1, "probability": 0.9}',
            "of which only one is allowed",
        ),
        (b'{"prompt": "a", "completion": "b", "label": "maybe"}', "label is 'maybe'"),
        (b'{"prompt": "a", "completion": "b", "label": null}', "label is None"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "b"}', "are the same"),
        (
            b'{"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "a"}]}',
            "are the same",
        ),
        (b'{"chosen": "b c", "rejected": "d e"}', "prompt is empty"),
        (b'{"chosen": "a b", "rejected": "a b c"}', None),
        (b'{"chosen": "a b", "rejected": "a"}', "prompt is empty"),
        (b'{"prompt": [{"role": "bot", "content": "a"}]}', "unknown role 'bot'"),
        (b'{"prompt": [{"role": ["user"], "content": "a"}]}', "unknown role"),
        (b'{"prompt": [{"role": "user"}]}', "role and content expected"),
        (b'{"prompt": [{"role": "user", "content": null}]}', "prompt[0].content is null"),
        (b'{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}', "prompt is plain text"),
        (b'{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}', "one by the assistant"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "by the assistant; for prompts alone write {"),
        (b'{"prompt": "a", "dialogue": [1]}', "dialogue is a list"),
        (b'{"prompt": "caf\xe9"}', "not UTF-8: byte 0xe9 at 15"),
        (b'{"prompt": "a\0"}', "NUL"),
        (b'{"prompt": "a\\u0000"}', "NUL"),
        (b'{"prompt": "a\\ud800"}', "surrogate"),
        (b'{"prompt": "a", "x": ["\\ud800"]}', "another field contains an unpaired surrogate"),
        (b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"prompt": "' + b"a" * MAX_LINE_BYTES + b'"}', "longer than 10,000,000 bytes"),
    ],
)
def test_a_bad_row_is_a_problem_that_says_why(line: bytes, what: str | None) -> None:
    parsed = parse_line(line)
    if what is None:
        assert isinstance(parsed, list)
        return
    assert isinstance(parsed, Problem)
    assert parsed.where == "f:1"
    assert what in parsed.what
    assert len(parsed.what) < 400, "a long row is not quoted whole"


def test_reading_keeps_the_good_rows_and_numbers_the_bad(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    good = json.dumps({"prompt": "a", "completion": "b", "label": True}).encode()
    huge = b'{"prompt": "' + b"a" * (2 * MAX_LINE_BYTES) + b'"}'
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\n" + huge + b"\n{oops\n" + good)
    records = read_jsonl(path)
    assert len(records.ratings) == 2
    assert [problem.where for problem in records.problems] == [f"{path}:3", f"{path}:4"]


def test_prompts_are_unique_by_context_and_columns(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b", "label": True}
    records = read(tmp_path, row, {**row, "label": False}, {**row, "hard": True})
    assert [prompt.columns for prompt in records.prompts] == [{}, {"hard": True}]


def test_files_that_cannot_be_used_are_user_errors(tmp_path: Path) -> None:
    empty, bad, loop = tmp_path / "empty.jsonl", tmp_path / "bad.jsonl", tmp_path / "loop.jsonl"
    empty.touch()
    bad.write_text("oops\n")
    loop.symlink_to(loop)
    expected = {
        tmp_path / "none.jsonl": "no such file",
        tmp_path: "is a folder",
        loop: "cannot be read",
        empty: "no usable row: it is empty",
        bad: f"no usable row; the first: {bad}:1: not JSON",
    }
    for path, what in expected.items():
        with pytest.raises(UserError) as error:
            load_records("jsonl", str(path), seed=0)
        assert what in error.value.what
        assert error.value.where == str(path)
        assert error.value.remedy


def rating(answer: str, label: bool, context: str = "q") -> Rating:
    return Rating((Turn("user", context),), Turn("agent", answer), label, context)


def test_pairs_are_made_within_a_context_only() -> None:
    ratings = [rating("a", True), rating("b", False), rating("c", True, "other")]
    (pair,) = pair_ratings(ratings)
    assert (pair.better.text, pair.worse.text, pair.dialogue) == ("a", "b", "q")


def test_an_answer_with_both_labels_is_in_no_pair() -> None:
    ratings = [rating("a", True), rating("a", False), rating("b", False), rating("c", True)]
    assert [(pair.better.text, pair.worse.text) for pair in pair_ratings(ratings)] == [("c", "b")]


def test_few_pairs_use_many_answers() -> None:
    ratings = [rating(f"up{i}", True) for i in range(3)] + [rating(f"down{i}", False) for i in range(3)]
    pairs = pair_ratings(ratings, at_most=3)
    assert len({pair.better for pair in pairs}) == len({pair.worse for pair in pairs}) == 3
    assert len(pair_ratings(ratings, at_most=99)) == 9


def test_repeats_are_kept_once_in_order() -> None:
    ratings = [rating("b", True), rating("a", False), rating("b", True), rating("c", True), rating("c", False)]
    assert without_repeats(ratings) == ratings[:2]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_labels_as_text_are_the_same_in_every_form_and_errors_name_the_users_column(
    form: str, tmp_path: Path
) -> None:
    words = {"yes": 1.0, " Thumbs down ": 0.0, "👍": 1.0, "1": 1.0, "0.7": 0.7, "-1": 0.0, "maybe": None}
    words |= {"thumbs-up": 1.0, "Thumb_Down": 0.0, "👍\U0001f3fd": 1.0, "👎\ufe0f": 0.0}  # as phones send thumbs
    file = tmp_path / f"own.{form}"
    if form == "csv":
        lines = [f"{n},c,{word}" for n, word in enumerate(words)]
        file.write_text("\n".join(["prompt,completion,rating", *lines]))
    else:
        rows = [{"prompt": f"{n}", "completion": "c", "rating": word} for n, word in enumerate(words)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for columns in ({"label": "rating"}, {}):
        if not columns:
            file.write_text(file.read_text().replace("rating", "label"))
        found = read_jsonl(file, columns)
        values = [float(one.label) if one.probability is None else one.probability for one in found.ratings]
        assert values == [value for value in words.values() if value is not None]
        (problem,) = found.problems
        assert problem.what.startswith(f"{'rating' if columns else 'label'} is 'maybe'; true or false")


def test_stars_are_not_read_as_thumbs(tmp_path: Path) -> None:
    """One of five stars is the worst rating, but 1 is a thumb up, so the whole file is refused."""
    file = tmp_path / "stars.jsonl"
    rows = [{"prompt": f"q{n}", "completion": "a", "label": n % 5 + 1} for n in range(10)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="Convert one to five stars"):
        read_jsonl(file)
