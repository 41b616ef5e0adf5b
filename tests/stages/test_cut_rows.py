"""Rows that are too long: their number is printed and recorded; the first token and the system turn are kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import trl

from perl.recipe import load_recipe
from perl.stages.opening import open_session
from perl.stages.reward_rows import training_rows
from perl.stages.rl_setup import tokenized_prompts
from perl.stages.session import Session
from perl.stages.sft import tokenized
from tests.conftest import DRINKS, RunCli, WriteRecipe, write_rows

SYSTEM = {"role": "system", "content": "Be kind."}
SFT = {"epochs": 1, "batch_size": 8}
REWARD = {"loss": "thumbs", "epochs": 1, "batch_size": 8}
QWEN3 = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"


def asked(drink: str, turns: int = 3) -> list[dict[str, str]]:
    """Return a dialogue that ends with a user turn."""
    said = [f"A {drink}, please.", "What size would you like?"]
    roles = ["user", "assistant"]
    return [SYSTEM, *({"role": roles[i % 2], "content": said[i % 2]} for i in range(turns))]


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """Write 60 ratings and as many demonstrations of 30 dialogues."""
    rows: list[Any] = []
    for index in range(30):
        prompt = asked(DRINKS[index % 10])
        rows += [
            {"prompt": prompt, "completion": answer, "label": label, "dialogue": f"{index}"}
            for answer, label in (("Large.", True), (f"No, {index}.", False))
        ]
        rows += [
            {"prompt": prompt, "completion": f"One {size}.", "dialogue": f"{index}"} for size in ("tea", "mocha")
        ]
    return {"source": "jsonl", "path": str(write_rows(tmp_path / "rows.jsonl", rows)), "held_out": 0.3}


def session_of(recipe: Path, out: Path) -> Session:
    return open_session(load_recipe(recipe), out)


def test_all_rows_of_a_file_too_long_are_said_aloud(
    data: dict[str, Any], run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    rl = {
        "reward": {"function": "rewards.py:length"},
        **{"steps": 1, "prompts_per_step": 2, "max_new_tokens": 4, "eval_prompts": 2, "max_prompt_length": 60},
    }
    sft, reward = {**SFT, "max_length": 80}, {**REWARD, "max_length": 70}
    recipe = write_recipe(data=data, sft=sft, reward=reward, rl=rl)
    code, text = run_cli("run", recipe, "--out", tmp_path / "out")
    assert code == 0, text
    assert "60 of 60 rows are longer than 80 tokens (sft.max_length)" in text
    assert "60 of 60 rows are longer than 70 tokens (reward.max_length)" in text
    assert " ".join(text.split()).count("An answer that is longer by itself is cut, too.") == 2, "not of prompts"
    stages = json.loads((tmp_path / "out" / "report.json").read_text())["stages"]
    prompts = stages["rl"]["rows"]
    assert f"{prompts} of {prompts} rows are longer than 60 tokens (rl.max_prompt_length)" in text
    assert [stages[stage]["rows_cut"] for stage in ("sft", "reward", "rl")] == [60, 60, prompts]
    assert [stages[stage]["rows"] for stage in ("sft", "reward")] == [60, 60]
    session = session_of(recipe, tmp_path / "other")
    begins = session.base.tokenizer("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nA ")["input_ids"][
        :-1
    ]
    rows = [
        *tokenized(session, session.train.demonstrations)["input_ids"],
        *training_rows(session).ids,
        *tokenized_prompts(session, session.train.prompts).ids,
    ]
    assert all(row[: len(begins)] == begins for row in rows)
    decoded = [session.base.tokenizer.decode(row) for row in rows]
    assert not any("What size" in text for text in decoded), "the oldest exchange is gone, whole"
    code, text = run_cli("evaluate", tmp_path / "out", "reward", "--data", f"jsonl:{data['path']}")
    assert code == 0, text
    assert "rows are longer than 70 tokens (reward.max_length)" in text


def test_nothing_is_said_where_all_rows_fit(
    data: dict[str, Any], run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(data=data, sft={**SFT, "max_length": 256}, reward=None, rl=None)
    code, text = run_cli("run", recipe, "--out", tmp_path / "out")
    assert code == 0, text
    assert "longer than" not in text
    sft = json.loads((tmp_path / "out" / "report.json").read_text())["stages"]["sft"]
    assert (sft["rows"], sft["rows_cut"]) == (60, 0)


def test_a_template_that_rewrites_history_gives_each_answer_a_row_and_says_so(
    tiny_llama: Path, run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """Qwen3's template removes the (empty) thoughts from all answers but the last."""
    rows = [{"messages": [*asked(drink), {"role": "assistant", "content": "Large."}]} for drink in DRINKS]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "chat_template.jinja").write_text(QWEN3.read_text(encoding="utf-8"), encoding="utf-8")
    recipe = write_recipe(
        base={"model": str(model), "dtype": "float32"},
        data={"source": "jsonl", "path": str(file), "held_out": 0.3},
        sft={**SFT, "max_length": 256},
        reward=None,
        rl=None,
    )
    code, text = run_cli("run", recipe, "--out", tmp_path / "out")
    assert code == 0, text
    assert "10 demonstrations make 20 rows" in text
    assert json.loads((tmp_path / "out" / "report.json").read_text())["stages"]["sft"]["rows"] == 20
