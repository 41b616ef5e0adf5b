"""Twelve faults injected into the real code, each of which once made a run silently learn nothing.

Each stops the run within two steps, with status 1 and a message that names it; without a fault, no run stops.
Recipes have only RL where the fault allows it; there all roles equal the base before the first update.
"""

import contextlib
import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import perl.adapters.low_rank
import perl.rl.samplers.local
import perl.stages.pipeline
from perl.adapters.low_rank import _Kept
from perl.parallel.engine import Engine
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.roles.shared_base import SharedBase
from perl.stages.session import Session
from tests.conftest import RunCli, WriteRecipe

RL = {
    "reward": {"function": "rewards.py:length"},
    "steps": 3,
    "prompts_per_step": 4,
    "max_new_tokens": 16,
    "eval_prompts": 2,
    "missing_end_penalty": 0.0,
}
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def loud(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base whose log-probs differ as a trained base's do."""
    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("loud") / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llama, initializer_range=0.2)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loud_gpt2(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return such a base of another family, with dropout in its configuration and Conv1D layers."""
    folder = shutil.copytree(tiny_gpt2, tmp_path_factory.mktemp("loud") / "gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config.from_pretrained(tiny_gpt2, initializer_range=0.2)).save_pretrained(folder)
    return folder


# The faults.

Patch = pytest.MonkeyPatch


def adapter_not_trained(patch: Patch) -> None:
    train_only = Roles.train_only

    def but_the_policy(self: Roles, *roles: Role) -> list[nn.Parameter]:
        return train_only(self, *(role for role in roles if role is not Role.POLICY))

    patch.setattr(Roles, "train_only", but_the_policy)


def gradient_cut(patch: Patch) -> None:
    """Cut the gradient, so that none reaches the adapter, although it requires gradients."""
    step = torch.optim.AdamW.step

    def step_without(self: Any, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None
        return step(self, closure)

    patch.setattr(torch.optim.AdamW, "step", step_without)


def optimizer_over_copies(patch: Patch) -> None:
    def copied(self: Engine, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        groups = [
            group | {"params": [nn.Parameter(parameter.detach().clone()) for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        return torch.optim.AdamW(groups)

    patch.setattr(Engine, "optimizer", copied)


Alter = Callable[[dict[str, list[_Kept]], str, list[_Kept]], list[_Kept]]


def sampler_computes_with(patch: Patch, alter: Alter) -> None:
    """Alter the factors that the sampler keeps; `alter` gets a memory, the adapter's name, and the factors."""
    kept_factors, memory = perl.adapters.low_rank.kept_factors, {}

    @contextlib.contextmanager
    def altered(layers: Any, name: str, dtype: torch.dtype) -> Iterator[None]:
        layers = list(layers)
        with kept_factors(layers, name, dtype):
            kept = [layer.kept._replace(a_IR=layer.kept.a_IR.clone()) for layer in layers]
            if name == Role.POLICY and kept:
                kept = alter(memory, name, [one._replace(b_RO=one.b_RO.clone()) for one in kept])
            for layer, one in zip(layers, kept, strict=True):
                layer.kept = one
            yield

    patch.setattr(perl.adapters.low_rank, "kept_factors", altered)


def sampler_stale(patch: Patch) -> None:
    sampler_computes_with(patch, lambda memory, name, kept: memory.setdefault(name, kept))


def swapped_one_step_late(patch: Patch) -> None:
    def late(memory: dict[str, list[_Kept]], name: str, kept: list[_Kept]) -> list[_Kept]:
        before = memory.get(name, kept)
        memory[name] = kept
        return before

    sampler_computes_with(patch, late)


def scale_doubled(patch: Patch) -> None:
    sampler_computes_with(patch, lambda _, __, kept: [one._replace(scale=2 * one.scale) for one in kept])


def scale_doubled_everywhere(patch: Patch) -> None:
    add = SharedBase._add_weights

    def doubled(self: SharedBase, role: Role, copy_of: Role) -> None:
        add(self, role, copy_of)
        for layer in self.adapter._layers:
            layer.scaling[role] *= 2

    patch.setattr(SharedBase, "_add_weights", doubled)


def rank_truncated(patch: Patch) -> None:
    def half(one: _Kept) -> _Kept:
        rank = one.a_IR.shape[1]
        return one._replace(a_IR=one.a_IR * (torch.arange(rank) < rank // 2))

    sampler_computes_with(patch, lambda _, __, kept: [half(one) for one in kept])


def wrong_role(patch: Patch) -> None:
    sampling = SharedBase.sampling
    patch.setattr(
        SharedBase,
        "sampling",
        lambda self, role: sampling(self, self.reference if role is Role.POLICY else role),
    )


def reference_is_the_policy(patch: Patch) -> None:
    forward = Roles.forward

    def mixed_up(self: Roles, role: Role, *arguments: Any, **keywords: Any) -> Any:
        return forward(self, Role.POLICY if role is self.reference else role, *arguments, **keywords)

    patch.setattr(Roles, "forward", mixed_up)


def dropout_left_on(patch: Patch) -> None:
    train = SharedBase.train
    patch.setattr(SharedBase, "train", lambda self, mode=True: train(self, True))


def head_lost(patch: Patch) -> None:
    """Replace the trained head by a new one, so that values are 0."""
    forward = Roles.forward

    def without(self: Roles, *arguments: Any, **keywords: Any) -> Any:
        outputs = forward(self, *arguments, **keywords)
        return outputs if outputs.values_BT is None else outputs._replace(values_BT=0 * outputs.values_BT)

    patch.setattr(Roles, "forward", without)


def base_merged(patch: Patch) -> None:
    sampling = SharedBase.sampling

    @contextlib.contextmanager
    @torch.no_grad()
    def merging(self: SharedBase, role: Role) -> Iterator[list[torch.Tensor]]:
        for adapted in self.adapter.layers(role):
            weight = adapted.base.weight
            weight += adapted.layer.get_delta_weight(role).to(weight.dtype)
        with sampling(self, Role.BASE) as seen:
            yield seen

    patch.setattr(SharedBase, "sampling", merging)


def temperature_off(patch: Patch) -> None:
    draw_next = perl.rl.samplers.local._draw_next

    def warmer(model: Any, hidden_BD: Any, sampling: Any, *rest: Any) -> Any:
        return draw_next(model, hidden_BD, dataclasses.replace(sampling, temperature=1.05), *rest)

    patch.setattr(perl.rl.samplers.local, "_draw_next", warmer)


def template_changed(patch: Patch) -> None:
    train_rl = perl.stages.pipeline.TRAIN["rl"]

    def after(session: Session) -> dict[str, Any]:
        tokenizer = session.base.chat.tokenizer
        tokenizer.chat_template = "Be brief. " + str(tokenizer.chat_template)
        return train_rl(session)

    patch.setitem(perl.stages.pipeline.TRAIN, "rl", after)


FAULTS: dict[str, tuple[Callable[[Patch], None], str, dict[str, Any]]] = {
    "adapter not trained": (adapter_not_trained, "the adapter is not trained", {}),
    "adapter not trained: no gradient": (gradient_cut, "unchanged modules of the policy", {}),
    "optimizer over copies": (optimizer_over_copies, "perhaps a copy", {}),
    "sampler stale": (sampler_stale, "the sampler is stale", {}),
    "swapped one step late": (swapped_one_step_late, "swapped one step late", {}),
    "wrong role": (wrong_role, "the sampler computes as a wrong role: base instead of policy", {}),
    "wrong role: reference": (reference_is_the_policy, "the base computes with the weights of the policy", {}),
    "scale doubled": (scale_doubled, "the scale is wrong: the sampler adds 2 times", {}),
    "scale doubled everywhere": (
        scale_doubled_everywhere,
        "the scale is wrong: the forward pass adds 2 times",
        {},
    ),
    "rank truncated": (rank_truncated, "the rank is truncated", {}),
    "dropout left on": (dropout_left_on, "dropout is on", {"lora": {"rank": 4, "alpha": 8, "dropout": 0.5}}),
    "head lost": (head_lost, "the critic does not depend on its own head: its head is lost", {}),
    "base merged": (base_merged, "an adapter was merged into the base", {}),
    "temperature off": (temperature_off, "agree best at about 1.05", {}),
}


FAULT_CASES = [
    pytest.param(fault, dtype, marks=[pytest.mark.slow] * (dtype == "float32" and number % 3 > 0))
    for number, fault in enumerate(FAULTS)
    for dtype in DTYPES
]
"""All run in bfloat16, whose rounding could hide them; in float32 every third unless time does not matter."""


@pytest.mark.parametrize(("fault", "dtype"), FAULT_CASES)
def test_an_injected_fault_stops_the_run_within_two_steps_by_its_name(
    fault: str,
    dtype: str,
    loud: Path,
    run_cli: RunCli,
    write_recipe: WriteRecipe,
    tmp_path: Path,
    monkeypatch: Patch,
) -> None:
    inject, words, changes = FAULTS[fault]
    inject(monkeypatch)
    changes = {"lora": {"rank": 4, "alpha": 8}} | changes
    out = tmp_path / "out"
    recipe = write_recipe(reward=None, base={"model": str(loud), "dtype": dtype}, rl=RL, **changes)
    code, text = run_cli("run", recipe, "--out", out)
    said = " ".join(text.split())
    assert code == 1, said
    assert words in said
    assert "Traceback" not in text
    assert not (out / "policy" / "adapter").exists()
    log = out / "policy" / "metrics.jsonl"
    assert not log.exists() or len(log.read_text().splitlines()) <= 1
    monkeypatch.undo()
    if list(out.glob("policy/checkpoints/step-*")):  # a fault that first showed in training: the state is whole
        assert run_cli("run", recipe, "--out", out)[0] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_template_changed_after_the_reward_stage(
    dtype: str, loud: Path, run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: Patch
) -> None:
    template_changed(monkeypatch)
    recipe = write_recipe(base={"model": str(loud), "dtype": dtype}, rl=RL | {"reward": {}})
    code, text = run_cli("run", recipe, "--out", tmp_path / "out")
    assert code == 1, text
    assert "the chat template, the tokenizer or the data have changed since the reward stage" in " ".join(
        text.split()
    )


# Nothing injected.

FUNCTION = {"reward": None}
RATED = {"rl": RL | {"reward": {}}}
CLEAN: dict[str, dict[str, Any]] = {
    "shared critic": FUNCTION,
    "adapter critic": FUNCTION | {"rl": RL | {"critic": "adapter"}},
    "ppo": FUNCTION | {"rl": RL | {"algorithm": "ppo", "epochs": 2}},
    "rloo": FUNCTION | {"rl": RL | {"algorithm": "rloo", "samples_per_prompt": 2}},
    "full tuning": FUNCTION | {"tuning": "full"},
    "top half": FUNCTION | {"lora": {"rank": 4, "alpha": 8, "layers": "top-half"}},
    "lora dropout": FUNCTION | {"lora": {"rank": 4, "alpha": 8, "dropout": 0.3}},
    "activations computed again": FUNCTION | {"checkpoint_activations": True},
    "reward model": RATED,
    "reward model, adapter critic": {"rl": RL | {"reward": {}, "critic": "adapter"}},
    "after SFT": {"sft": {"epochs": 2, "batch_size": 4, "learning_rate": 0.01}} | RATED,
    "after SFT, full tuning": {"sft": {"epochs": 1, "batch_size": 4}, "tuning": "full"} | RATED,
    "another temperature": FUNCTION | {"rl": RL | {"temperature": 0.7}},
}

BASES = list(itertools.product(["llama", "gpt2"], DTYPES))
CLEAN_CASES = [
    pytest.param(name, *base, marks=[pytest.mark.slow] * (place != number % 4))
    for number, name in enumerate(CLEAN)
    for place, base in enumerate(BASES)
]
"""Each configuration with one family and one dtype; all combinations if time does not matter."""


@pytest.mark.parametrize(("configuration", "family", "dtype"), CLEAN_CASES)
def test_nothing_injected_stops_nothing(
    configuration: str,
    family: str,
    dtype: str,
    loud: Path,
    loud_gpt2: Path,
    mixed_data: Path,
    run_cli: RunCli,
    write_recipe: WriteRecipe,
    tmp_path: Path,
) -> None:
    base = {"model": str(loud if family == "llama" else loud_gpt2), "dtype": dtype}
    data = {"source": "jsonl", "path": str(mixed_data), "held_out": 0.3}
    recipe = partial(write_recipe, base=base, data=data)(**{"rl": RL} | CLEAN[configuration])
    code, text = run_cli("run", recipe, "--out", tmp_path / "out")
    assert code == 0, text
    stage = json.loads((tmp_path / "out" / "report.json").read_text())["stages"]["rl"]
    assert stage["incidents"] == []
    names = [finding["name"] for finding in stage["liveness"]]
    assert {"policy learns", "frozen roles unchanged", "sampled as read", "roles apart"} <= set(names)
    assert "begins as the reference" not in names
