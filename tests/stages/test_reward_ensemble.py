"""Reward ensembles: scores, combination in RL, resuming, reuse and export."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from perl.measure.ensemble import disagreement, ensemble_scores
from perl.recipe import load_recipe
from perl.rl.rewards.model import combined
from perl.roles.role import REWARD_MEMBERS
from perl.runs.folder import RunFolder
from perl.stages import reuse
from perl.stages.reward_scores import run_disagreement
from perl.stages.session import Session
from tests.conftest import RunCli, WriteRecipe

WEIGHTS = "adapter_model.safetensors"


def test_scores_of_an_ensemble_by_hand() -> None:
    # Probabilities 3/4 and 1/4 have the mean 1/2 and the standard deviation 1/4.
    scores_MN = np.array([[math.log(3), 2.0], [-math.log(3), 4.0]])
    assert ensemble_scores(scores_MN, log_odds=True)[0] == pytest.approx(0.0, abs=1e-12)
    assert disagreement(scores_MN, log_odds=True)[0] == pytest.approx(0.25)
    assert ensemble_scores(scores_MN, log_odds=False)[1] == 3.0
    assert disagreement(scores_MN, log_odds=False)[1] == 1.0
    sure = np.array([[800.0], [900.0]])  # whose probabilities are 1 to the last bit
    assert ensemble_scores(sure, log_odds=True)[0] == pytest.approx(800 + math.log(2), rel=1e-12)


@pytest.mark.parametrize(("loss", "expected"), [("pairs", [0.0, 1.0]), ("thumbs", [0.5, 0.5])])
def test_what_is_added_to_all_scores_of_a_model_of_pairs_is_no_disagreement(
    loss: str, expected: list[float]
) -> None:
    means = {REWARD_MEMBERS[0]: 100.0, REWARD_MEMBERS[1]: -100.0}
    session = SimpleNamespace(
        recipe=SimpleNamespace(reward=SimpleNamespace(loss=loss)),
        reward_members=list(means),
        stamp=lambda role: SimpleNamespace(reward_mean=means[role]),
    )
    found = run_disagreement(cast(Session, session), np.array([[100.0, 101.0], [-100.0, -101.0]]))
    assert found.tolist() == pytest.approx(expected)


def test_rewards_of_an_ensemble_by_hand() -> None:
    rewards_MB = torch.tensor([[1.0, 0.0], [3.0, 0.5]], dtype=torch.float64)
    assert combined(rewards_MB, "mean", 1.0).tolist() == [2.0, 0.25]
    assert combined(rewards_MB, "min", 1.0).tolist() == [1.0, 0.0]
    assert combined(rewards_MB, "mean_minus_std", 0.5).tolist() == [1.5, 0.125]


def test_the_recipe_allows_as_many_members_as_there_are_roles(write_recipe: WriteRecipe) -> None:
    most = len(REWARD_MEMBERS)
    assert load_recipe(write_recipe(reward={"members": most}, rl=None)).reward.members == most
    with pytest.raises(Exception, match=f"less than or equal to {most}"):
        load_recipe(write_recipe(reward={"members": most + 1}, rl=None))


@pytest.mark.parametrize(
    ("reward", "part", "message"),
    [
        ({}, {"combine": "min"}, "combine min needs several members Set reward.members to at least 2"),
        ({"members": 2}, {"members": [1, 3]}, "there is no member 3"),
        ({"members": 2}, {"std_weight": 2}, "combine mean has no std_weight"),
        ({"bootstrap": True}, {}, "bootstrap makes members differ, but there is one"),
    ],
)
def test_what_makes_no_sense_is_refused(
    reward: dict[str, object], part: dict[str, object], message: str, run_cli: RunCli, write_recipe: WriteRecipe
) -> None:
    code, text = run_cli("run", write_recipe(reward=reward, rl={"reward": {"kind": "model", **part}}))
    assert (code, message in " ".join(text.split())) == (2, True), text


def weights_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob(WEIGHTS))}


def test_an_ensemble_is_trained_resumed_scored_exported_and_taken(
    run_cli: RunCli, write_recipe: WriteRecipe, small_data: Path, tmp_path: Path
) -> None:
    def run(command: str, *arguments: object) -> str:
        code, text = run_cli(command, *arguments)
        assert code == 0, text
        return text

    recipe = write_recipe(
        checkpoint_every=2,
        lora={"rank": 2, "alpha": 4, "layers": "top-half", "dropout": 0.1},
        reward={"epochs": 2, "batch_size": 4, "learning_rate": 0.01, "members": 2, "bootstrap": True},
        rl={
            "reward": {"kind": "model", "combine": "mean_minus_std", "std_weight": 0.5},
            "steps": 1,
            "prompts_per_step": 2,
            "max_new_tokens": 4,
            "eval_prompts": 2,
        },
    )
    out = tmp_path / "out"
    run("run", recipe, "--out", out)
    written = weights_of(out)
    first, second = (load_file(out / "reward" / name / "adapter" / WEIGHTS) for name in (".", "member-2"))
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[name], second[name]) for name in first)
    card = json.loads((out / "reward" / "result.json").read_text())["eval"]
    assert len(card["ensemble"]["auroc"]) == 2

    # Interrupted in the second member's training, it ends in the same bytes.
    (out / "reward" / "result.json").unlink()
    shutil.rmtree(out / "policy")
    shutil.rmtree(out / "reward" / "member-2" / "adapter")
    checkpoints = sorted((out / "reward" / "member-2" / "checkpoints").iterdir())
    shutil.rmtree(checkpoints[-1])
    run("run", recipe, "--out", out)
    assert weights_of(out) == written
    assert json.loads((out / "reward" / "result.json").read_text())["eval"] == card

    run("evaluate", out, "reward", "--json", tmp_path / "card.json")
    assert json.loads((tmp_path / "card.json").read_text()) == card
    run("score", out, small_data / "ratings.jsonl", "--out", tmp_path / "scores.jsonl")
    scored = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert all(line["disagreement"] > 0 for line in scored)
    assert "the others: reward" in run("export", out, "reward_2", tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / WEIGHTS)
    assert all(torch.equal(exported[name], second[name]) for name in second)
    assert run_cli("export", out, "reward_3", tmp_path / "third")[0] == 2

    # Another run reuses it, trains on one of its members and selects with another.
    judged = (
        "rl.reward={kind: model, members: [1]}",
        "rl.eval_reward={kind: model, members: [2]}",
        "rl.eval_steps=1",
    )
    text = run("run", recipe, "--out", tmp_path / "taken", "--from", out, *judged)
    assert "reward is taken" in text
    taken = weights_of(tmp_path / "taken" / "reward")
    assert taken == weights_of(out / "reward")


def test_members_that_go_on_bring_all_their_checkpoints(tmp_path: Path) -> None:
    source, folder = RunFolder(tmp_path / "source"), RunFolder(tmp_path / "copy")
    for role in REWARD_MEMBERS[:2]:
        (source.role(role) / "checkpoints" / "step-2").mkdir(parents=True)
        (source.role(role) / "adapter").mkdir()
    reuse.take(folder, "reward", reuse.Found(source, "continue", "more epochs"), main=True)
    assert sorted(str(path.relative_to(folder.path)) for path in folder.path.rglob("step-2")) == [
        "reward/checkpoints/step-2",
        "reward/member-2/checkpoints/step-2",
    ]
    assert not list(folder.path.rglob("adapter"))
