"""Starting a role from an existing adapter, with checks that it fits the base and the role."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perl.adapters.folder import PREFIX, AdapterFolder
from perl.backbones.base import Base
from perl.errors import UserError
from perl.recipe.adapter import LORA
from perl.roles.role import Role
from perl.roles.saved import HEAD, STAMP, read_stamp, read_weights, shape_difference, tensors_on_disk
from perl.roles.score_terms import SCORE_TERMS
from perl.roles.shared_base import SharedBase

AGAIN = "Save or download it again."
CLASSIFIER = "SEQ_CLS"


def load_start(roles: SharedBase, role: Role, folder: AdapterFolder, base: Base) -> list[str]:
    """Load a folder's weights, and its head if it has one, into a new role; return notes for the user.

    Raises:
        UserError: the adapter is for another base or task, or computes differently from the recipe's adapters.
    """
    settings = roles.adapter.settings
    folder.refuse_conflicts(getattr(settings, "kind", LORA), settings.model_dump())
    if differs := roles.adapter.unlike(folder.config):
        raise UserError(
            f"its configuration has {differs}, which PERL does not support in adapters of kind {folder.kind}",
            where=folder.where,
            remedy="Use an adapter that was trained without it.",
        )
    notes = _check_base(folder, base)
    read = read_weights(folder.path, roles.weights_file, AGAIN)
    weights = {roles.adapter.name_here(name): tensor for name, tensor in read.items()}
    modules = [*(roles.head_modules or [HEAD.partition(".")[0]]), *SCORE_TERMS]
    heads = tuple(f"{PREFIX}{module}." for module in modules)
    has_head = any(name.startswith(heads) for name in weights)
    _check_task(folder, role, has_head, roles.backbone.task_type)
    _drop_fixed(roles, role, weights, folder)
    targets = tensors_on_disk(roles, role)
    if role in roles.heads and not has_head:
        notes.append("it has no head, so the head starts at zero")
    targets = {name: one for name, one in targets.items() if name in weights or not name.startswith(heads)}
    for term in SCORE_TERMS:
        there, here = (any(name.startswith(f"{PREFIX}{term}.") for name in of) for of in (weights, targets))
        if there != here:
            how = "with" if there else "without"
            raise UserError(
                f"the adapter was trained {how} reward.{term}",
                where=folder.where,
                remedy=f"Set reward.{term}: {str(there).lower()}.",
            )
    if difference := shape_difference(weights, targets):
        raise UserError(
            f"the adapter does not fit {base.name} with {_places(roles)}{difference}{_trained_on(folder)}",
            where=folder.where,
            remedy="Use the base that it was trained on, or an adapter of this base; leave targets and layers "
            "out of the recipe.",
        )
    with torch.no_grad():
        for name, parameter in targets.items():
            parameter.copy_(weights[name])
    return notes


def _check_base(folder: AdapterFolder, base: Base) -> list[str]:
    """Refuse a stamp of another base; without a stamp, only the base's name can be compared."""
    if (folder.path / STAMP).is_file():
        stamp = read_stamp(folder.path, AGAIN)
        if stamp.base_sha256 != base.sha256:
            raise UserError(
                f"the adapter belongs to another base: {stamp.base}, SHA-256 {stamp.base_sha256[:12]}; here "
                f"it is {base.name}, {base.sha256[:12]}",
                where=folder.where,
                remedy="Use that base, in the dtype and quantization that the adapter was trained with.",
            )
        changed = stamp.chat_sha256 != base.chat.sha256
        return ["it was trained with a chat format other than the base's current one"] if changed else []
    name = str(folder.config.get("base_model_name_or_path") or "")
    other = name and Path(name).name != Path(base.name).name
    return [f"its configuration names the base {name}, but its tensors fit {base.name}"] if other else []


def _check_task(folder: AdapterFolder, role: Role, has_head: bool, generating: str) -> None:
    """Refuse a classifier's adapter for a language model, and adapters for any other task.

    Args:
        generating: peft's task type for language models like the base.
    """
    tasks = {generating: "a language model's", CLASSIFIER: "a sequence classifier's"}
    task = str(folder.config.get("task_type") or (CLASSIFIER if has_head else generating))
    if (task in tasks and role is Role.REWARD) or (task == generating and not has_head):
        return
    wanted = "a language model's or a sequence classifier's" if role is Role.REWARD else tasks[generating]
    what = "a language model's with a head" if has_head and task == generating else tasks.get(task, f"for {task}")
    raise UserError(
        f"the adapter is {what}; {role} needs {wanted}",
        where=folder.where,
        remedy="Set reward.adapter for a reward model or critic, sft.adapter or rl.adapter for a policy.",
    )


def _drop_fixed(roles: SharedBase, role: Role, weights: dict[str, Tensor], folder: AdapterFolder) -> None:
    """Remove the tensors that are never trained, after checking that they equal those here.

    Raises:
        UserError: they differ.
    """
    for name, fixed in roles.adapter.fixed(role).items():
        there = weights.pop(name, weights.pop(PREFIX + name, None))
        same = there is None or (
            there.shape == fixed.shape and torch.allclose(there.float(), fixed.cpu(), rtol=5e-3, atol=1e-4)
        )
        if not same:
            raise UserError(
                f"its {name}, which is never trained, differs from the one that all roles here share",
                where=folder.where,
                remedy="It comes from another base or seed, or another version; train a new adapter here.",
            )


def _places(roles: SharedBase) -> str:
    said: Mapping[str, Any] = roles.adapter.settings.model_dump()
    places = (
        f"{roles.adapter.section}.{key}: {json.dumps(said[key])}" for key in ("targets", "layers") if key in said
    )
    return " and ".join(places)


def _trained_on(folder: AdapterFolder) -> str:
    name = folder.config.get("base_model_name_or_path")
    return f"; it was trained on {name}" if name else ""
