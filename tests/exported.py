"""Runs on tiny models and their roles' outputs, with which exported models are compared."""

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perl.backbones.padding import left_pad
from perl.commands.export import STAGES
from perl.data.records import Turn
from perl.recipe import Recipe, StageName
from perl.results import RESULTS, StageResult
from perl.roles.role import Role
from perl.stages.opening import open_run, open_session
from perl.system.typed_json import made
from tests.conftest import BRIEF
from tests.report.made import make_report

SPEAKERS = {"user": "user", "assistant": "agent"}


def recipe_on(model: Path, data: Path, **changes: Any) -> Recipe:
    """Return a recipe of all three stages on a base; `changes` replace its keys, and None removes them."""
    recipe: dict[str, Any] = {
        "name": "tiny-run",
        "base": {"model": str(model), "dtype": "float32"},
        "lora": {"rank": 2, "alpha": 4},
        "data": {"source": "jsonl", "path": str(data), "held_out": 0.3},
        "sft": {"batch_size": 4, "learning_rate": 0.01, "max_length": 64},
        "reward": {"epochs": 8, "batch_size": 4, "learning_rate": 0.01, "max_length": 64},
        "rl": {
            **BRIEF,
            "critic": "shared",
            "steps": 2,
            "prompts_per_step": 2,
            "max_new_tokens": 4,
            "eval_prompts": 2,
            "learning_rate": 0.01,
        },
        **changes,
    }
    return Recipe.model_validate({key: value for key, value in recipe.items() if value is not None})


def make(out: Path, recipe: Recipe) -> Path:
    """Write a run folder as its stages do, with random instead of trained weights."""
    session = open_session(recipe, out)
    generator = torch.Generator().manual_seed(1)
    with session.folder.claim(recipe):
        for role in (Role.SFT, Role.REWARD, Role.POLICY, Role.CRITIC):
            if STAGES[role] not in recipe.stages or (role is Role.CRITIC and recipe.critic == "none"):
                continue
            own = role is not Role.CRITIC or recipe.critic == "adapter"
            session.roles.add(role, weights=own, head=role in (Role.REWARD, Role.CRITIC))
            for parameter in session.roles.parameters_of(role):
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
            thumbs = role is Role.REWARD and recipe.reward is not None and recipe.reward.loss == "thumbs"
            session.save(role, reward_is_probability=thumbs, reward_mean=0.25, reward_std=0.5)
            session.folder.finish(STAGES[role], made_up(STAGES[role]))
    return out


def made_up(stage: StageName) -> StageResult:
    """Return a plausible result of a stage."""
    report = make_report(random.Random(0), seed=0, tuning="lora", steps=2)
    return made(RESULTS[stage], report["stages"][stage])


class Run:
    """A finished run that computes with its own roles."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.session = open_run(folder)

    def ids(self, dialogue: list[dict[str, str]] | tuple[str, str]) -> list[int]:
        """Return the tokens of chat messages, or of a text and its answer."""
        if isinstance(dialogue, tuple):
            turns = [Turn("text", text) for text in dialogue]
        else:
            turns = [Turn(SPEAKERS[message["role"]], message["content"]) for message in dialogue]  # type: ignore[arg-type]
        return self.session.base.chat.row(turns[:-1], turns[-1]).ids

    @torch.no_grad()
    def scores(self, role: Role, dialogues: list[Any], trunk: Role | None = None) -> Tensor:
        """Return a role's head's outputs for whole dialogues, in one batch."""
        for needed in (role, trunk or role):
            self.session.load(needed)
        batch = left_pad([self.ids(one) for one in dialogues], self.session.base.chat.pad_id, torch.device("cpu"))
        scores_B = self.session.roles(trunk or role, *batch, head=role).scores_B
        assert scores_B is not None
        return scores_B

    @torch.no_grad()
    def log_probs(self, role: Role, ids: list[int]) -> Tensor:
        """Return the log-probs of all tokens but the first."""
        self.session.load(role)
        ids_BL = torch.tensor([ids])
        outputs = self.session.roles(
            role,
            ids_BL,
            torch.ones_like(ids_BL, dtype=torch.bool),
            completion_length=len(ids) - 1,
            temperature=1.0,
        )
        assert outputs.log_probs_BT is not None
        return outputs.log_probs_BT[0]
