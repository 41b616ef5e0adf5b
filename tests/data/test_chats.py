"""`data.chat`: plain text in the base's chat format, as if it had been written as messages."""

import json
from pathlib import Path

from perl.data.records import Turn
from perl.library import load_run
from perl.recipe import load_recipe
from perl.stages.opening import open_session
from perl.stages.reward_rows import session_rows
from tests.conftest import DRINKS, RunCli, WriteRecipe, write_rows

NOTE = "to which the base's chat format is not applied"


def rated(folder: Path) -> tuple[Path, Path]:
    """Write the same rows as plain text and as messages: thumbs, a pair and a demonstration."""
    files = []
    for name in ("plain", "messages"):
        rows = []
        for drink in DRINKS:
            text = f"A {drink}, please."
            prompt = text if name == "plain" else [{"role": "user", "content": text}]
            rows += [
                {"prompt": prompt, "completion": f"One {drink}.", "label": True, "dialogue": drink},
                {"prompt": prompt, "completion": "No.", "label": False, "dialogue": drink},
                {"prompt": prompt, "chosen": f"One {drink}.", "rejected": "Go.", "dialogue": drink},
                {"prompt": prompt, "completion": f"Here: {drink}.", "dialogue": drink},
            ]
        files.append(write_rows(folder / f"{name}.jsonl", rows))
    return files[0], files[1]


def test_plain_rows_are_the_tokens_of_the_same_rows_as_messages(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    found = []
    for file, chat in zip((*rated(tmp_path), rated(tmp_path)[0]), (True, False, False), strict=True):
        data = {"source": "jsonl", "path": str(file), "held_out": 0.3, "chat": chat}
        session = open_session(
            load_recipe(write_recipe(data=data, sft={}, reward={"loss": "both"}, rl=None)), tmp_path
        )
        rows = session_rows(session, session.train, "both")
        demonstrations = [(one.context, one.answer) for one in session.train.demonstrations]
        found.append(([row.ids for row in rows.tokens], demonstrations))
    chats, messages, plain = found
    assert chats == messages
    assert plain[0] != chats[0]
    assert chats[1][0][0][0].speaker == "user"


def test_a_run_on_chats_says_nothing_and_scores_and_completes_plain_text_as_such(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    data = {"source": "jsonl", "path": str(rated(tmp_path)[0]), "held_out": 0.3}
    sections = {"reward": {"epochs": 2, "batch_size": 4}, "rl": None}
    code, text = run_cli("run", write_recipe(data=data, **sections), "--out", tmp_path / "plain")
    assert code == 0, text
    assert NOTE in " ".join(text.split())
    code, text = run_cli("run", write_recipe(data={**data, "chat": True}, **sections), "--out", tmp_path / "chats")
    assert code == 0, text
    assert NOTE not in " ".join(text.split())
    run = load_run(tmp_path / "chats")
    said = [{"role": "user", "content": "A tea, please."}]
    assert run.score(["A tea, please."], ["One tea."]) == run.score([said], ["One tea."])
    assert run.generate(["A tea, please."], "base") == run.generate([said], "base")
    one = {"prompt": "A tea, please.", "completion": "One tea."}
    file = write_rows(tmp_path / "one.jsonl", [one])
    code, text = run_cli("score", tmp_path / "chats", file, "--out", tmp_path / "scored.jsonl")
    assert code == 0, text
    scored = json.loads((tmp_path / "scored.jsonl").read_text())
    assert abs(scored["score"] - run.score([said], ["One tea."])[0]) < 1e-5
    code, text = run_cli("evaluate", tmp_path / "chats", "reward", "--data", rated(tmp_path)[0])
    assert code == 0, text


def test_init_applies_the_chat_format_of_the_base(run_cli: RunCli, tiny_llama: Path, tmp_path: Path) -> None:
    plain, messages = rated(tmp_path)
    for file, expected in ((plain, True), (messages, False)):
        recipe = tmp_path / f"{file.stem}.yaml"
        code, text = run_cli("init", recipe, "--data", file, "--base", tiny_llama)
        assert code == 0, text
        assert load_recipe(recipe).data.chat == expected
        assert ("chat format is applied to them" in text) == expected


def test_turns_of_text_become_those_of_a_chat() -> None:
    from perl.data.chats import answered, asked

    assert asked((Turn("text", " Hi. "),)) == (Turn("user", "Hi."),)
    assert answered(Turn("text", " Hello.")) == Turn("agent", "Hello.")
    assert answered(Turn("agent", " Hello.")) == Turn("agent", " Hello.")
