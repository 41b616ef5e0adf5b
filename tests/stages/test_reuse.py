"""Stages of another run are reused if they fit, continued if the recipe has more steps, else trained again."""

import json
from pathlib import Path

import pytest
import yaml

from perl.stages.sft import RoleTrainer
from tests.conftest import RunCli, WriteRecipe, write_rows

SFT = {"epochs": 1, "batch_size": 4, "learning_rate": 0.01}
REWARD = {"loss": "thumbs", "epochs": 1, "batch_size": 4, "max_length": 64}
RL = {"steps": 1, "prompts_per_step": 2, "max_new_tokens": 4, "eval_prompts": 2, "reward": {}}


def rows(count: int = 24) -> list[dict[str, object]]:
    ratings: list[dict[str, object]] = [
        {"prompt": f"order {n}", "completion": f"with {word} {n}", "label": good}
        for n in range(count // 2)
        for word, good in (("care", True), ("noise", False))
    ]
    return [*ratings, *({"prompt": f"ask {n}", "completion": f"answer {n}"} for n in range(count // 2))]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", rows())


def weights(out: Path) -> dict[str, bytes]:
    files = out.glob("*/adapter/adapter_model.safetensors")
    return {file.parent.parent.name: file.read_bytes() for file in files}


def change(recipe: Path, section: str, **keys: object) -> None:
    content = yaml.safe_load(recipe.read_text())
    content[section] |= keys
    recipe.write_text(yaml.safe_dump(content))


def test_three_settings_of_rl_cost_three_stages_of_rl(
    run_cli: RunCli, write_recipe: WriteRecipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    where = {"source": "jsonl", "path": str(data), "held_out": 0.3}
    recipe = write_recipe(data=where, sft=SFT, reward=REWARD, rl=RL)
    code, text = run_cli("run", recipe)
    assert code == 0, text
    logs = []
    for rate in (0.001, 0.002):
        code, log = run_cli("run", recipe, f"rl.learning_rate={rate}", "--from", "runs/tiny")
        assert code == 0, log
        logs.append(log)
    for rate, log, folder in zip((0.001, 0.002), logs, ("tiny-2", "tiny-3"), strict=True):
        assert "sft is taken from runs/tiny." in log
        assert "reward is taken from runs/tiny." in log
        assert f"rl is trained again: rl.learning_rate was its default and is {rate}" in log
        assert f"runs/{folder}/" in log
    stages = json.loads((tmp_path / "runs" / "tiny-2" / "report.json").read_text())["stages"]
    assert [stage.get("reused_from") for stage in stages.values()] == ["runs/tiny", "runs/tiny", None]
    one, two, three = (weights(tmp_path / "runs" / name) for name in ("tiny", "tiny-2", "tiny-3"))
    assert one["sft"] == two["sft"] == three["sft"]
    assert one["reward"] == two["reward"]
    assert len({one["policy"], two["policy"], three["policy"]}) == 3
    code, log = run_cli("run", recipe, "rl.learning_rate=0.002", "--from", "runs/tiny")
    assert "rl is already finished" in log, "the same setting again is the same run"
    # A reused stage belongs to this run: the other may be deleted, and this one can be read and exported.
    code, log = run_cli("evaluate", "runs/tiny-3", "reward")
    assert code == 0, log


@pytest.mark.parametrize(("schedule", "continues"), [("constant", True), ("cosine", False)])
def test_more_epochs_and_steps_continue_where_the_schedule_allows_it(
    schedule: str, continues: bool, run_cli: RunCli, write_recipe: WriteRecipe, data: Path, tmp_path: Path
) -> None:
    keep = {"lr_scheduler_type": schedule}
    where = {"source": "jsonl", "path": str(data), "held_out": 0.3}
    recipe = write_recipe(data=where, sft=SFT | keep, reward=None, rl=None)
    longer = "sft.epochs=2"
    assert run_cli("run", recipe, "--out", tmp_path / "short")[0] == 0
    code, log = run_cli("run", recipe, longer, "--from", tmp_path / "short", "--out", tmp_path / "more")
    assert code == 0, log
    assert run_cli("run", recipe, longer, "--out", tmp_path / "at-once")[0] == 0
    assert weights(tmp_path / "more") == weights(tmp_path / "at-once")
    results = [json.loads((tmp_path / out / "sft" / "result.json").read_text()) for out in ("more", "at-once")]
    assert results[0]["eval"] == results[1]["eval"]
    if continues:
        assert "sft is continued from" in log
        assert "sft.epochs was its default and is 2" in log
    else:
        assert "sft is trained again" in log
        assert "its learning rate depends on the number of steps (cosine)" in log
        assert "sft.lr_scheduler_type: constant would allow continuing it" in log


def test_a_continued_stage_keeps_the_best_weights_of_the_shorter_run(
    run_cli: RunCli, write_recipe: WriteRecipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shorter run's best is the extra validation after its last step, which the longer run does not have."""
    losses = {4: 2.0, 6: 1.0}  # step 4 is the longer run's best

    def loss(trainer: RoleTrainer) -> float:
        return losses.get(trainer.state.global_step, 3.0)

    monkeypatch.setattr(RoleTrainer, "validation_loss", loss)
    where = {"source": "jsonl", "path": str(data), "held_out": 0.3}
    sft = {**SFT, "batch_size": 1, "eval_steps": 4, "validation_share": 0.3, "lr_scheduler_type": "constant"}
    recipe = write_recipe(data=where, sft=sft, reward=None, rl=None, checkpoint_every=5)
    code, log = run_cli("run", recipe, "--out", tmp_path / "short")
    assert "weights are those of step 6 of 6" in log
    longer = "sft.epochs=2"
    code, log = run_cli("run", recipe, longer, "--from", tmp_path / "short", "--out", tmp_path / "more")
    assert code == 0, log
    assert "sft is continued from" in log
    assert run_cli("run", recipe, longer, "--out", tmp_path / "at-once")[0] == 0
    assert weights(tmp_path / "more") == weights(tmp_path / "at-once")


def test_a_stage_that_was_not_begun_may_change_in_its_folder(
    run_cli: RunCli, write_recipe: WriteRecipe, data: Path, tmp_path: Path
) -> None:
    where = {"source": "jsonl", "path": str(data), "held_out": 0.3}
    recipe, out = write_recipe(data=where, reward=REWARD, rl=None), tmp_path / "out"
    assert run_cli("reward", recipe, "--out", out)[0] == 0
    recipe = write_recipe(data=where, reward=REWARD, rl=RL)
    code, text = run_cli("rl", recipe, "rl.learning_rate=0.002", "--out", out)
    assert code == 0, text
    assert "learning_rate: 0.002" in (out / "recipe.yaml").read_text()
    code, text = run_cli("rl", recipe, "--out", out)
    assert code == 2, "now it was"
    assert "there rl.learning_rate is 0.002" in text
    assert f"with --from {out}" in text


def test_more_steps_of_rl_continue(
    run_cli: RunCli, write_recipe: WriteRecipe, small_data: Path, tmp_path: Path
) -> None:
    rl = RL | {"lr_scheduler_type": "constant", "reward": {"function": "rewards.py:length"}}
    recipe = write_recipe(reward=None, rl=rl)
    assert run_cli("run", recipe, "--out", tmp_path / "short")[0] == 0
    code, log = run_cli("run", recipe, "rl.steps=3", "--from", tmp_path / "short", "--out", tmp_path / "more")
    assert code == 0, log
    assert "rl is continued from" in log
    assert run_cli("run", recipe, "rl.steps=3", "--out", tmp_path / "at-once")[0] == 0
    assert weights(tmp_path / "more") == weights(tmp_path / "at-once")
    code, log = run_cli("run", recipe, "--from", tmp_path / "more", "--out", tmp_path / "less")
    assert "rl is trained again: rl.steps was 3 and is 1, which is less" in log
    by_share = ("rl.prompt_sampling=curriculum", "rl.success_reward=1")
    assert run_cli("run", recipe, *by_share, "--out", tmp_path / "easy")[0] == 0
    longer = ("rl.steps=3", "--from", tmp_path / "easy", "--out", tmp_path / "easier")
    code, log = run_cli("run", recipe, *by_share, *longer)
    assert "the curriculum depends on the number of steps" in " ".join(log.split())


def test_changed_rows_are_refused_by_count_and_trained_again_elsewhere(
    run_cli: RunCli, write_recipe: WriteRecipe, data: Path, tmp_path: Path
) -> None:
    where = {"source": "jsonl", "path": str(data), "held_out": 0.3}
    recipe, out = write_recipe(data=where, sft=SFT, rl=None), tmp_path / "out"
    assert run_cli("run", recipe, "--out", out)[0] == 0
    for stage in ("sft", "reward"):
        stamp = json.loads((out / stage / "adapter" / "perl.json").read_text())
        report = json.loads((out / "report.json").read_text())["stages"][stage]
        state = json.loads(next((out / stage / "checkpoints").glob("*/state.json")).read_text())
        assert stamp["data_sha256"] == report["data_sha256"] == state["belongs"]["data"]
    changed = rows()
    changed[0]["label"] = False
    changed = [
        *changed[:2],
        *changed[3:],
        *({"prompt": f"new {n}", "completion": "x", "label": True} for n in (1, 2)),
    ]
    write_rows(data, changed)
    code, text = run_cli("run", recipe, "--out", out)
    assert code == 2
    assert (
        "since reward was trained here, the data have changed (2 rows added, 1 row removed, 1 row edited)" in text
    )
    assert f"`perl-rlhf run` with --from {out} trains" in text
    code, text = run_cli("evaluate", out, "reward")
    assert code == 2, "held-out rows may be among those that were trained on"
    assert "2 rows added" in text
    code, text = run_cli("run", recipe, "--from", out, "--out", tmp_path / "again")
    assert code == 0, text
    assert "reward is trained again: the data have changed (2 rows added" in text


def test_a_stage_of_any_length_is_not_continued_on_changed_rows(
    run_cli: RunCli, write_recipe: WriteRecipe, data: Path, tmp_path: Path
) -> None:
    where = {"source": "jsonl", "path": str(data), "held_out": 0.3}
    sft = SFT | {"lr_scheduler_type": "constant"}
    recipe, out = write_recipe(data=where, sft=sft, reward=None, rl=None), tmp_path / "out"
    assert run_cli("run", recipe, "--out", out)[0] == 0
    write_rows(data, [*rows(), {"prompt": "new", "completion": "x"}])
    code, text = run_cli("run", recipe, "--from", out, "--out", tmp_path / "again")
    assert code == 0, text
    assert "sft is trained again: the data have changed (1 row added" in text


def test_rows_added_during_an_interrupted_stage_are_noticed(
    run_cli: RunCli, write_recipe: WriteRecipe, data: Path, tmp_path: Path
) -> None:
    where = {"source": "jsonl", "path": str(data), "held_out": 0.3}
    recipe, out = write_recipe(data=where, sft=SFT, reward=None, rl=None), tmp_path / "out"
    assert run_cli("run", recipe, "--out", out)[0] == 0
    (out / "sft" / "result.json").unlink()
    write_rows(data, [*rows(), *({"prompt": f"more {n}", "completion": "x"} for n in range(40))])
    code, text = run_cli("run", recipe, "--out", out)
    assert code == 2
    assert "since sft was trained here, the data have changed (40 rows added)" in text


def test_a_section_names_the_run_that_its_stage_is_of(
    run_cli: RunCli, write_recipe: WriteRecipe, data: Path, tmp_path: Path
) -> None:
    where = {"source": "jsonl", "path": str(data), "held_out": 0.3}
    recipe, one = write_recipe(data=where, sft=SFT, rl=None), tmp_path / "one"
    assert run_cli("run", recipe, "--out", one)[0] == 0
    recipe = write_recipe(data=where, sft={"from": str(one)}, reward={"from": str(one)}, rl=None)
    code, text = run_cli("run", recipe, "--out", tmp_path / "two")
    assert code == 0, text
    assert "sft is taken from" in text
    assert weights(tmp_path / "two") == weights(one)
    change(recipe, "reward", learning_rate=0.5)
    code, text = run_cli("run", recipe, "--out", tmp_path / "three")
    assert code == 2
    assert "reward does not fit: reward.learning_rate was its default and is 0.5" in text
    assert not (tmp_path / "three").exists()
    change(recipe, "reward", **{"from": str(tmp_path / "gone")})
    code, text = run_cli("run", recipe, "--out", tmp_path / "three")
    assert code == 2
    assert "not a run folder" in text


def test_a_reward_function_that_was_edited_is_another(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe, out = write_recipe(reward=None), tmp_path / "out"
    assert run_cli("run", recipe, "--out", out)[0] == 0
    with open(tmp_path / "rewards.py", "a") as file:
        file.write("# changed\n")
    code, text = run_cli("run", recipe, "--out", out)
    assert code == 2
    assert "since rl was trained here, the file of rl.reward.function" in text


def test_rl_against_a_model_that_is_not_fit_is_asked_for(
    run_cli: RunCli, write_recipe: WriteRecipe, data: Path, tmp_path: Path
) -> None:
    where = {"source": "jsonl", "path": str(data), "held_out": 0.3}
    recipe, out = write_recipe(data=where, reward=REWARD, rl=RL | {"anyway": False}), tmp_path / "out"
    code, text = run_cli("run", recipe, "--out", out)
    assert code == 2
    assert "the reward model is not fit for RL: Too few to tell" in text
    assert "rl.anyway=true" in text
    assert (out / "report.html").exists(), "the card says why"
    assert not (out / "policy").exists()
    code, text = run_cli("run", recipe, "rl.anyway=true", "--out", out)
    assert code == 0, text
    assert "reward is already finished" in text
    page = (out / "report.html").read_text()
    assert "Trained against a reward model that is not fit for RL." in page.partition("</section>")[0]


def test_from_a_csv_of_thumbs_to_a_verdict_and_from_there_to_a_policy(
    run_cli: RunCli, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new user needs two commands and one edit for the verdict, then one of each for the policy."""
    monkeypatch.chdir(tmp_path)
    lines = [
        f"order {n},with {word} {n},{thumb}"
        for n in range(12)
        for word, thumb in (("care", "up"), ("noise", "down"))
    ]
    (tmp_path / "thumbs.csv").write_text("\n".join(["question,response,rating", *lines]))
    code, text = run_cli("data", "check", "thumbs.csv")
    assert code == 2, "no column has a name that is read"
    assert "data.columns: {prompt: question, completion: response, label: rating}" in " ".join(text.split())
    (tmp_path / "my.yaml").write_text(
        f"name: my\nbase: {{model: {tiny_llama}, dtype: float32}}\n"
        "data: {path: thumbs.csv, held_out: 0.3, "
        "columns: {prompt: question, completion: response, label: rating}}\n"
        "reward: {max_length: 64}\n"
    )
    code, text = run_cli("run", "my.yaml")
    assert code == 0, text
    assert "Not fit for RL" in text
    with open("my.yaml", "a") as file:
        file.write("rl: {anyway: true, steps: 1, prompts_per_step: 2, max_new_tokens: 4, eval_prompts: 2}\n")
    code, text = run_cli("run", "my.yaml", "--from", "runs/my")
    assert code == 0, text
    assert "reward is taken from runs/my." in text
    assert (tmp_path / "runs" / "my-2" / "policy" / "adapter").is_dir()


def test_a_file_of_ones_own_is_held_out_as_it_is(
    run_cli: RunCli, write_recipe: WriteRecipe, data: Path, tmp_path: Path
) -> None:
    own = [
        {"prompt": f"another {n}", "completion": word, "label": word == "care"}
        for n in range(3)
        for word in ("care", "x")
    ]
    write_rows(tmp_path / "eval.jsonl", [*own, rows()[0]])
    where = {"path": str(data), "eval_path": "eval.jsonl"}
    recipe, out = write_recipe(data=where, rl=None), tmp_path / "out"
    code, text = run_cli("run", recipe, "--out", out)
    assert code == 0, text
    card = json.loads((out / "reward" / "result.json").read_text())["eval"]
    assert (card["n"], card["seen_in_training"]) == (7, 1)
