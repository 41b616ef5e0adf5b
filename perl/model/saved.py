"""Roles on disk, in the formats of the libraries that read them, with a stamp that says what they belong to.

adapter_config.json  adapter_model.safetensors   an adapter as plain peft reads it; a head is the module `score`
config.json          model.safetensors           under full tuning: a whole model, as transformers names things
perl.json                                        the stamp: base, tokenizer, chat format, parent, scale
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from perl import __version__
from perl.errors import UserError
from perl.files import whole_folder, write_json
from perl.model.base import Base
from perl.model.roles import Role, Roles

HEAD = "score.weight"
STAMP = "perl.json"


@dataclass(frozen=True)
class Stamp:
    """What a role's weights belong to; loading them elsewhere is refused."""

    role: str
    base: str
    base_sha256: str
    tokenizer_sha256: str
    chat_sha256: str
    end_id: int
    parent_sha256: str | None = None
    """Of the weights file of the role that this one started from."""
    reward_is_probability: bool = False
    """A reward model of thumbs: its score is the log-odds of a thumb up, and RL takes the probability."""
    reward_mean: float = 0.0
    """Mean of the reward on the training rows; RL takes it off."""
    reward_std: float = 1.0
    """Their standard deviation; RL divides by it."""
    perl: str = __version__


def stamp_for(role: Role, base: Base, **more: Any) -> Stamp:
    """The stamp of a role trained now on this base."""
    tokenizer = json.dumps(base.tokenizer.get_vocab(), sort_keys=True).encode()
    return Stamp(
        role=role,
        base=base.name,
        base_sha256=base.sha256,
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
        chat_sha256=base.chat.sha256,
        end_id=base.chat.end_id,
        **more,
    )


def save_role(roles: Roles, role: Role, folder: Path, stamp: Stamp) -> None:
    """Write a role's weights and head as one whole folder."""
    scores = role in roles.heads
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in _on_disk(roles, role).items()}
    with whole_folder(folder) as unfinished:
        save_file(weights, unfinished / roles.weights_file, {"format": "pt"})
        with roles.role(role if roles.weights(role) else roles.reference):
            roles.write_config(unfinished, stamp.base, scores=scores)
        write_json(unfinished / STAMP, dataclasses.asdict(stamp))


def _on_disk(roles: Roles, role: Role) -> dict[str, torch.Tensor]:
    """What a role learns, by the names it has on disk."""
    named: dict[str, torch.Tensor] = {f"{roles.prefix}{name}": p for name, p in roles.weights(role).items()}
    if role in roles.heads:
        named[roles.prefix + HEAD] = roles.head(role).weight
    return named


def load_role(roles: Roles, role: Role, folder: Path, base: Base) -> Stamp:
    """Read a role's weights and head from a folder; the role is added if it is new.

    Raises:
        UserError: files missing or broken, another base, tokenizer or chat format, another shape.
    """
    stamp = read_stamp(folder)
    _refuse_other_base(stamp, stamp_for(role, base), folder)
    try:
        weights = load_file(folder / roles.weights_file)
    except (OSError, SafetensorError) as error:
        where = str(folder / roles.weights_file)
        raise UserError(f"cannot be read: {error}", where=where, remedy="Train this stage again.") from None
    head = roles.prefix + HEAD
    if role not in roles.roles:
        roles.add(role, weights=bool(weights.keys() - {head}), head=head in weights)
    targets = _on_disk(roles, role)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    fits = shapes == {name: tuple(parameter.shape) for name, parameter in targets.items()}
    with roles.role(role):
        if not fits or not _config_fits(roles, folder):
            raise UserError(
                "has another rank, alpha, targets or layers than the recipe's lora section",
                where=str(folder),
                remedy="Set lora.rank, alpha, targets and layers as in its adapter_config.json.",
            )
    with torch.no_grad():
        for name, parameter in targets.items():
            parameter.copy_(weights[name])
    return stamp


def _refuse_other_base(stamp: Stamp, expected: Stamp, folder: Path) -> None:
    for name, what in {
        "base_sha256": "base",
        "tokenizer_sha256": "tokenizer",
        "chat_sha256": "chat format",
        "end_id": "end-of-turn token",
    }.items():
        if getattr(stamp, name) != getattr(expected, name):
            raise UserError(
                f"belongs to another {what}: trained on {stamp.base}, {name} {str(getattr(stamp, name))[:12]}; "
                f"here it is {str(getattr(expected, name))[:12]}",
                where=str(folder),
                remedy="Use the base named in its perl.json, or train the adapter again.",
            )


def _config_fits(roles: Roles, folder: Path) -> bool:
    try:
        return roles.config_fits(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"its configuration cannot be read: {error}", where=str(folder), remedy="Train this stage again."
        ) from None


def read_stamp(folder: Path) -> Stamp:
    """The stamp in a role's folder.

    Raises:
        UserError: no such folder, or it was not written by PERL.
    """
    try:
        return Stamp(**json.loads((folder / STAMP).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError("no adapter here", where=str(folder), remedy="Run its stage first.") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"not a stamp: {error}", where=str(folder / STAMP), remedy="Train this stage again."
        ) from None


def weights_sha256(roles: Roles, folder: Path) -> str:
    """SHA-256 of the weights file in a role's folder: how its children name their parent."""
    with open(folder / roles.weights_file, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
