"""What the stages of one run share: the recipe, the records, the base with its roles, and the run folder."""

import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from perl.data.records import Demonstration, Records
from perl.data.sources import load_records
from perl.data.splits import split
from perl.errors import UserError
from perl.measure.meter import Meter
from perl.model.adapters import load_adapter, weights_file_sha256
from perl.model.base import Base, load_base, random_base
from perl.model.build import build_base
from perl.model.lora import lora_config
from perl.model.roles import Role, Roles
from perl.progress import console
from perl.recipe import Recipe
from perl.rundir import RunFolder


@dataclass
class Session:
    """One process holds the base across all stages; it is loaded once."""

    recipe: Recipe
    folder: RunFolder
    train: Records
    held_out: Records
    base: Base
    roles: Roles
    device: torch.device

    def meter(self) -> Meter:
        """A meter that counts the base, the adapters and the heads among the live bytes."""

        def resident() -> list[Tensor]:
            return [*self.roles.parameters(), *self.roles.buffers()]

        return Meter(self.device, resident)

    def load(self, role: Role) -> None:
        """Load a role's adapter from the run folder, unless it is in memory."""
        if role not in self.roles.roles:
            load_adapter(self.roles, role, self.folder.adapter(role), self.base)

    def parent(self, role: Role) -> str | None:
        """The name by which an adapter trained from this role's calls its parent."""
        folder = self.folder.adapter(role)
        return weights_file_sha256(folder) if folder.exists() else None

    def trainer_settings(self) -> dict[str, Any]:
        """Settings of transformers' Trainer that every stage shares."""
        return {
            "seed": self.recipe.seed,
            "data_seed": self.recipe.seed,
            "use_cpu": self.device.type == "cpu",
            "bf16": False,  # the base has its dtype and the adapters are fp32: nothing is autocast
            "save_strategy": "no",
            "eval_strategy": "no",
            "logging_steps": 1,
            "report_to": [],
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": self.device.type == "cuda",
            "lr_scheduler_type": "cosine",
            "warmup_steps": 10,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
        }


def open_session(recipe: Recipe, out: Path) -> Session:
    """Read the data, check it for every stage, and load the base: nothing is written before all of it fits.

    Raises:
        UserError: whatever of the recipe, the data or the base cannot be used.
    """
    _quiet_libraries()
    seed_everything(recipe.seed)
    folder = RunFolder(out)
    folder.check(recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    records = load_records(recipe.data.source, recipe.data.path, recipe.seed)
    if records.problems:
        first = records.problems[0]
        console.print(
            f"[yellow]{len(records.problems)} rows left out[/], the first {first.where}: {first.what} "
            f"(`perl-rlhf data check` names them all)"
        )
    train, held_out = split(records, recipe.data.held_out, recipe.seed)
    _check_records(recipe, train)
    base = open_base(recipe, train, device)
    lora = recipe.lora
    config = lora_config(lora.rank, lora.alpha, lora.dropout, lora.targets, lora.layers, base.lm)
    return Session(recipe, folder, train, held_out, base, Roles(base.lm, config), device)


def open_base(recipe: Recipe, train: Records, device: torch.device) -> Base:
    """The base of a recipe: loaded, built or drawn at random."""
    spec, dtype = recipe.base, getattr(torch, recipe.base.dtype)
    if spec.build is not None:
        folder = build_base(_corpus(train), **spec.build.model_dump())
        return load_base(str(folder), dtype, device)
    if spec.config is not None:
        return random_base(spec.config, dtype, device, recipe.seed)
    assert spec.model is not None
    return load_base(
        spec.model,
        dtype,
        device,
        four_bit=spec.quantization == "4bit",
        random_seed=recipe.seed if spec.random_init else None,
    )


def _corpus(train: Records) -> list[Demonstration]:
    """What a tiny base is trained on: the source's own corpus, or all training records."""
    if train.corpus:
        return train.corpus
    rated = [Demonstration(record.context, (record.answer,), record.dialogue) for record in train.ratings]
    compared = [Demonstration(record.context, (record.better,), record.dialogue) for record in train.comparisons]
    return [*train.demonstrations, *rated, *compared]


def _check_records(recipe: Recipe, train: Records) -> None:
    needs = {
        "sft": (train.demonstrations, "demonstrations"),
        "reward": (train.ratings or train.comparisons, "ratings or comparisons"),
        "rl": (train.prompts, "prompts"),
    }
    for stage in recipe.stages:
        have, what = needs[stage]
        if not have:
            raise UserError(
                f"{recipe.data.source} has no {what}, which {stage} needs",
                where="data.source",
                remedy=f"Use another source, or take the section {stage} out of the recipe.",
            )


def _quiet_libraries() -> None:
    """No bars and notes of the libraries' own beside ours."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    # TRL's default sets the old name, and releases of transformers before the new one know no other.
    warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated", category=FutureWarning)


def seed_everything(seed: int) -> None:
    """Seed every global generator."""
    random.seed(seed)
    torch.manual_seed(seed)
