"""The public preference sets: small files in exactly the published schemas and layouts, read in both ways."""

import contextlib
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from perl.commands.data import check
from perl.data.published import PUBLIC_SETS
from perl.data.records import Comparison, Records, Turn
from perl.data.sources import load_records, load_rows
from perl.data.splits import split
from perl.errors import MachineError, UserError

Row = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def hh(question: str, chosen: str = "Yes, gladly.", rejected: str = "No.", more: str = "") -> Row:
    """Return a row of Anthropic/hh-rlhf."""
    begin = f"\n\nHuman: {question}{more}\n\nAssistant: "
    return {"chosen": begin + chosen, "rejected": begin + rejected}


def shp(post: str, label: int = 1, a: str = "Salt it.", b: str = "Dunno.") -> Row:
    """Return a row of stanfordnlp/SHP with all its fields."""
    return {
        "post_id": post,
        "domain": "askculinary_train",
        "upvote_ratio": 0.98,
        "history": f"How do I cook {post}? It is always dry.",
        "c_root_id_A": "hpm1q2s",
        "c_root_id_B": "hpm1q2t",
        "created_at_utc_A": 1640453430,
        "created_at_utc_B": 1640453401,
        "score_A": 340,
        "score_B": 166,
        "human_ref_A": a,
        "human_ref_B": b,
        "labels": label,
        "seconds_difference": 29.0,
        "score_ratio": 2.048192771,
    }


def tldr(key: str, choice: int = 1, part: str = "train", **info: Any) -> Row:
    """Return a row of the comparisons of openai/summarize_from_feedback with all its fields."""
    return {
        "info": {
            "id": key,
            "post": f"My dog ate {key}.",
            "title": "Dog",
            "subreddit": "pets",
            "site": None,
            "article": None,
            **info,
        },
        "split": part,
        "summaries": [
            {"text": f" Dog ate {key}.", "policy": "sup4_ppo_rm3_kl10", "note": "fine"},
            {"text": "Dog ate it", "policy": "ref", "note": None},
        ],
        "choice": choice,
        "worker": "fpmNat1D2iHbPxPvkbrbKCyZXvMGRD",
        "batch": "batch3",
        "extra": {"confidence": 7},
    }


ROWS = {"hh-rlhf": hh, "shp": shp, "tldr": tldr}
EXPECTED = {
    "hh-rlhf": Comparison((Turn("user", "Why?"),), Turn("agent", "Yes, gladly."), Turn("agent", "No."), "why?"),
    "shp": Comparison(
        (Turn("user", "How do I cook Why?? It is always dry."),),
        Turn("agent", "Salt it."),
        Turn("agent", "Dunno."),
        "shp:Why?",
    ),
    "tldr": Comparison(
        (Turn("text", "SUBREDDIT: r/pets\n\nTITLE: Dog\n\nPOST: My dog ate Why?.\n\nTL;DR:"),),
        Turn("text", " Dog ate it"),
        Turn("text", " Dog ate Why?."),
        "tldr:Why?",
    ),
}


def write(file: Path, *rows: Row | str) -> Path:
    """Write JSON Lines, gzipped if the file name ends in .gz."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


def hh_folder(folder: Path, *parts: str) -> Path:
    """Write the hub's layout: one folder per part, and one that does not belong to the preference data."""
    for part in parts:
        write(folder / part / "train.jsonl.gz", *(hh(f"{part} {n}") for n in range(3)))
        write(folder / part / "test.jsonl.gz", *(hh(f"{part} {n}", "Ask again.") for n in range(2, 4)))
    write(folder / "red-team-attempts" / "red_team_attempts.jsonl.gz", {"min_harmlessness_score_transcript": -1.0})
    return folder


def texts(records: Records) -> list[str]:
    return sorted(f"{turn.text}" for row in records.comparisons for turn in row.context)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_as_published_becomes_a_comparison(name: str, tmp_path: Path) -> None:
    records = load_records(name, str(write(tmp_path / "rows.jsonl", ROWS[name]("Why?"))), seed=0)
    assert records.comparisons == [EXPECTED[name]]
    assert [(prompt.context, prompt.dialogue) for prompt in records.prompts] == [
        (EXPECTED[name].context, EXPECTED[name].dialogue)
    ]
    assert records.problems == []


def test_a_dialogue_of_hh_is_turns_up_to_the_answers(tmp_path: Path) -> None:
    row = hh("Hi", "Yes: \n\nfirst, do it.", "No.", more="\n\nAssistant: Hello.\n\nHuman: Help\n\nme?")
    (comparison,) = load_records("hh-rlhf", str(write(tmp_path / "a.jsonl", row)), 0).comparisons
    assert comparison.context == (Turn("user", "Hi"), Turn("agent", "Hello."), Turn("user", "Help\n\nme?"))
    assert comparison.better == Turn("agent", "Yes: \n\nfirst, do it.")
    assert comparison.dialogue == "hi"


@pytest.mark.parametrize("label", [0, 1])
def test_labels_of_shp_say_whether_a_is_better(label: int, tmp_path: Path) -> None:
    (comparison,) = load_records("shp", str(write(tmp_path / "a.json", shp("x", label))), 0).comparisons
    assert comparison.better.text == ("Salt it." if label else "Dunno.")
    assert (comparison.margin, comparison.probability) == (0.0, 1.0)


@pytest.mark.parametrize("choice", [0, 1])
def test_the_choice_of_tldr_is_the_better_summary(choice: int, tmp_path: Path) -> None:
    (comparison,) = load_records("tldr", str(write(tmp_path / "batch3.json", tldr("x", choice))), 0).comparisons
    assert comparison.better.text == (" Dog ate it" if choice else " Dog ate x.")


CONVERTED = {
    "hh-rlhf": {
        "prompt": [{"role": "user", "content": "Why?"}],
        "chosen": [{"role": "assistant", "content": "Yes, gladly."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
    "tldr": {"prompt": "SUBREDDIT: r/pets", "chosen": " Dog ate it", "rejected": " Dog ate x."},
}


@pytest.mark.parametrize("name", CONVERTED)
def test_what_trl_converted_is_read_as_well(name: str, tmp_path: Path) -> None:
    row, folder = CONVERTED[name], tmp_path / "data"
    folder.mkdir()
    for part in ("train", "test"):
        rows = [row, {**row, "prompt": [{"role": "user", "content": part}] if name == "hh-rlhf" else part}]
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{part}-00000-of-00001.parquet")
    records = load_records(name, str(tmp_path), seed=0)
    better = {comparison.better.text for comparison in records.comparisons}
    assert better == {EXPECTED[name].better.text}
    assert len(records.comparisons) == 3, "the training row that the test part has too is left out"


BAD = {
    "no object": ("hh-rlhf", "[1]", "the row is a list"),
    "not JSON": ("shp", '{"post_id": ', "not JSON"),
    "no dialogue": ("hh-rlhf", {"chosen": "Hi", "rejected": "Ho"}, "begins with '\\n\\nHuman:' expected"),
    "a human's end": ("hh-rlhf", hh("a", "b\n\nHuman: c"), "chosen ends with a turn by the human"),
    "an empty turn": ("hh-rlhf", hh("a", more="\n\nAssistant:\n\nHuman: b"), "chosen: turn 2 is empty"),
    "an empty answer": ("hh-rlhf", hh("a", rejected=" "), "the worse answer is empty"),
    "one answer": ("hh-rlhf", hh("a", "b", "b"), "both answers are the same"),
    "no rejected": ("hh-rlhf", {"chosen": "\n\nHuman: a\n\nAssistant: b"}, "fit no format"),
    "another question": (
        "hh-rlhf",
        {"chosen": hh("a")["chosen"], "rejected": hh("b")["rejected"]},
        "differ before their last turn",
    ),
    "no prompt": ("hh-rlhf", {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}, "there is no prompt"),
    "no post": ("shp", {**shp("x"), "history": None}, "history is null; text expected"),
    "no label": ("shp", {name: value for name, value in shp("x").items() if name != "labels"}, "has no labels"),
    "a label of 2": ("shp", shp("x", 2), "labels is 2"),
    "an empty history": ("shp", {**shp("x"), "history": " "}, "there is no prompt"),
    "a number for an id": ("shp", {**shp("x"), "post_id": 3}, "post_id is a number"),
    "no info": ("tldr", {**tldr("x"), "info": None}, "info is null; an object expected"),
    "no title": ("tldr", {**tldr("x"), "info": {"id": "x", "post": "p"}}, "info has no subreddit, title"),
    "a news article": ("tldr", tldr("x", post=None, article="News."), "about a news article"),
    "three summaries": ("tldr", {**tldr("x"), "summaries": tldr("x")["summaries"] * 2}, "a list of two expected"),
    "a summary as text": ("tldr", {**tldr("x"), "summaries": ["a", "b"]}, "summaries[0] is text"),
    "a choice of 2": ("tldr", tldr("x", 2), "choice is 2; 0 or 1 expected"),
    "a choice that is true": ("tldr", tldr("x", True), "choice is True"),
    "a rating": ("tldr", {"prompt": "a", "completion": "b", "label": True}, "the row is not a comparison"),
    "half a surrogate pair": ("shp", shp("x", a="\ud800"), "unpaired surrogate"),
    "nested too deeply": ("shp", "[" * 100_000 + "]" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize(("name", "row", "what"), BAD.values(), ids=BAD)
def test_a_bad_row_is_left_out_and_named(name: str, row: Row | str, what: str, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", ROWS[name]("good"), row)
    records = load_records(name, str(file), seed=0)
    assert len(records.comparisons) == 1
    (problem,) = records.problems
    assert problem.where == f"{file}:2"
    assert what in problem.what
    assert len(problem.what) < 400


def test_parts_are_read_from_the_folder_published_or_their_own(tmp_path: Path) -> None:
    folder = hh_folder(tmp_path, "harmless-base", "helpful-base", "helpful-online")
    everything = load_rows("hh-rlhf", str(folder), 0)
    assert len(everything.comparisons) == 15
    assert {(prompt.context[0].text[:-2], prompt.columns["source"]) for prompt in everything.prompts} == {
        (part, part) for part in ("harmless-base", "helpful-base", "helpful-online")
    }
    for name, path in (
        ("hh-rlhf/helpful-base", folder),
        ("hh-rlhf/helpful-base", folder / "helpful-base"),
        ("hh-rlhf", folder / "helpful-base"),
    ):
        records = load_rows(name, str(path), 0)
        assert {text[:12] for text in texts(records)} == {"helpful-base"}
        assert (len(records.comparisons), records.problems) == (5, [])
    assert len(load_rows("hh-rlhf", str(folder / "helpful-base" / "test.jsonl.gz"), 0).comparisons) == 2


@pytest.mark.parametrize(("name", "file"), [("hh-rlhf", "jsonl.gz"), ("shp", "json"), ("tldr", "jsonl")])
def test_the_published_test_part_is_held_out_and_nothing_leaks(name: str, file: str, tmp_path: Path) -> None:
    part = tmp_path / PUBLIC_SETS[name].parts[0]
    row = ROWS[name]
    write(part / f"train.{file}", *(row(f"q{n}") for n in range(5)))
    write(part / f"test.{file}", *(row(f"q{n}") for n in range(3, 7)), row("q6"))
    write(part / f"validation.{file}", row("q9"))
    if name == "tldr":  # where the rows have the split, not the files
        for old, part_name in (("train", "train"), ("test", "valid1"), ("validation", "valid2")):
            rows = [json.loads(line) for line in (part / f"{old}.{file}").read_text().splitlines()]
            write(part / f"batch_{part_name}.json", *({**row, "split": part_name} for row in rows))
            (part / f"{old}.{file}").unlink()
    records = load_records(name, str(tmp_path), seed=0)
    asked = ["q3", "q4", "q5", "q6"] if name != "tldr" else ["q3", "q4", "q5", "q6", "q9"]
    for seed in (0, 1):
        train, held_out = split(records, held_out=0.2, seed=seed)
        assert len(held_out.comparisons) == len(asked) + 1, "the test part, whole, whatever share or seed"
        assert len(train.comparisons) == 3, "q0 to q2: what the test part asks too is not trained on"
        kinds = ((side.comparisons, side.prompts) for side in (train, held_out))
        of_train, of_test = ({row.dialogue for kind in side for row in kind} for side in kinds)
        assert not of_train & of_test
        assert len(of_test) == len(asked)


def test_without_a_test_part_a_share_of_the_dialogues_is_held_out(tmp_path: Path) -> None:
    file = write(tmp_path / "train.json", *(shp(f"post{n // 3}", a=f"{n}") for n in range(60)))
    records = load_records("shp", str(file), seed=0)
    assert records.published_test == frozenset()
    train, held_out = split(records, held_out=0.2, seed=0)
    assert (len(train.comparisons), len(held_out.comparisons)) == (48, 12)
    assert not {row.dialogue for row in train.comparisons} & {row.dialogue for row in held_out.comparisons}


def test_prefixes_of_a_dialogue_of_hh_are_on_one_side(tmp_path: Path) -> None:
    longer = "\n\nAssistant: Hm.\n\nHuman: Go on."
    rows = [hh(f"q{n}", more=more) for n in range(10) for more in ("", longer)]
    train, held_out = split(load_records("hh-rlhf", str(write(tmp_path / "a.jsonl", *rows)), 0), 0.2, 0)
    first_turns = [{row.context[0].text for row in side.comparisons} for side in (train, held_out)]
    assert [len(side) for side in first_turns] == [8, 2]
    assert not first_turns[0] & first_turns[1]


@pytest.mark.parametrize("name", ROWS)
def test_the_datasets_library_reads_a_repository_as_the_files_are_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test makes the same call as for the hub, on a folder in the repository's layout."""
    public, repository = PUBLIC_SETS[name], tmp_path / "repository"
    part = repository / public.parts[0]
    if name == "tldr":  # the hub's own conversion to Parquet
        for split_name, said in (("train", "train"), ("validation", "valid1")):
            (part / split_name).mkdir(parents=True)
            rows = [tldr(f"{said}{n}", part=said) for n in range(2)]
            datasets.Dataset.from_list(rows).to_parquet(part / split_name / "0000.parquet")
    else:
        end = {"hh-rlhf": "jsonl.gz", "shp": "json"}[name]
        for split_name in ("train", "test"):
            write(part / f"{split_name}.{end}", *(ROWS[name](f"{split_name}{n}") for n in ("", 0, 1)))
    of_one_part = f"{name}/{part.name}" if len(public.parts) > 1 else name
    from_files = load_records(of_one_part, str(repository), seed=0)
    seen: list[dict[str, Any]] = []
    load = datasets.load_dataset

    def instead_of_the_hub(path: str, **options: Any) -> Any:
        seen.append({"path": path, **options})
        return load(str(repository), **options)

    monkeypatch.setattr(datasets, "load_dataset", instead_of_the_hub)
    from_hub = load_records(of_one_part, None, seed=0)
    assert seen == [{"path": public.repository, "data_dir": part.name, "revision": public.revision}]
    for side, same in zip(split(from_hub, 0.2, 0), split(from_files, 0.2, 0), strict=True):
        assert side.comparisons == same.comparisons
    assert from_hub.published_test == from_files.published_test != frozenset()
    assert len(from_hub.problems) == len(from_files.problems)


def test_a_hub_that_cannot_be_reached_is_the_machines_fault() -> None:
    with pytest.raises(MachineError, match=r"Anthropic/hh-rlhf/harmless-base: cannot be loaded") as error:
        load_records("hh-rlhf/harmless-base", None, seed=0)
    assert "data.path" in error.value.remedy


@contextlib.contextmanager
def refused(what: str, path: Path) -> Iterator[None]:
    with pytest.raises(UserError, match=what) as error:
        yield
    assert not isinstance(error.value, MachineError)
    assert str(path) in error.value.where
    assert error.value.remedy


def test_files_and_folders_that_cannot_be_used_are_user_errors(tmp_path: Path) -> None:
    with refused("no file that ends in .jsonl", tmp_path):
        load_records("shp", str(tmp_path), 0)
    with refused("no such file", tmp_path):
        load_records("shp", str(tmp_path / "gone"), 0)
    with refused("File name too long", Path("xxx")):
        load_records("shp", "x" * 5000, 0)
    cut = write(tmp_path / "hh" / "train.jsonl.gz", *(hh(f"{n}") for n in range(99)))
    cut.write_bytes(cut.read_bytes()[:-20])
    with refused("not a complete gzip file", cut):
        load_records("hh-rlhf", str(tmp_path / "hh"), 0)
    plain = tmp_path / "plain.jsonl.gz"
    plain.write_text(json.dumps(hh("a")))
    with refused("not a complete gzip file", plain):
        load_records("hh-rlhf", str(plain), 0)
    with refused("no usable row; the first: .*rows.json:1: the row has no post_id", tmp_path):
        load_records("shp", str(write(tmp_path / "rows.json", {"history": "a"})), 0)
    broken = tmp_path / "parquet" / "train.parquet"
    broken.parent.mkdir()
    broken.write_bytes(b"PAR1")
    with refused("cannot be loaded with the datasets library", broken.parent):
        load_records("tldr", str(broken.parent), 0)


def test_data_check_describes_a_set_with_all_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hh_folder(tmp_path, "harmless-base")
    assert check(f"hh-rlhf:{folder}") == 0
    assert "comparisons 5 4" in " ".join(capsys.readouterr().out.split())
    write(tmp_path / "harmless-base" / "more.jsonl", hh("a", "b", "b"))
    assert check(f"hh-rlhf/harmless-base:{folder}") == 2
    assert "more.jsonl:1: both answers are the same" in capsys.readouterr().out
