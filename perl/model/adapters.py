"""Adapters on disk: peft's own format, with a stamp that says what they belong to.

adapter_config.json  adapter_model.safetensors   as plain peft reads them; a head is the module `score`
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

PREFIX = "base_model.model."
HEAD = f"{PREFIX}score.weight"
WEIGHTS, STAMP = "adapter_model.safetensors", "perl.json"


@dataclass(frozen=True)
class Stamp:
    """What an adapter belongs to; loading it elsewhere is refused."""

    role: str
    base: str
    base_sha256: str
    tokenizer_sha256: str
    chat_sha256: str
    end_id: int
    parent_sha256: str | None = None
    """Of the weights file of the adapter that this one started from."""
    reward_is_probability: bool = False
    """A reward model of thumbs: its score is the log-odds of a thumb up, and RL takes the probability."""
    reward_mean: float = 0.0
    """Mean of the reward on the training rows; RL takes it off."""
    reward_std: float = 1.0
    """Their standard deviation; RL divides by it."""
    perl: str = __version__


def stamp_for(role: Role, base: Base, **more: Any) -> Stamp:
    """The stamp of an adapter trained now on this base."""
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


def save_adapter(roles: Roles, role: Role, folder: Path, stamp: Stamp) -> None:
    """Write a role's adapter and head as one whole folder."""
    weights = {f"{PREFIX}{name}": parameter.detach().cpu() for name, parameter in roles.adapter(role).items()}
    config = dataclasses.replace(roles.lora, base_model_name_or_path=stamp.base, inference_mode=True)
    config.task_type = "CAUSAL_LM"
    if role in roles.heads:
        weights[HEAD] = roles.head(role).weight.detach().cpu()
        config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
    with whole_folder(folder) as unfinished:
        save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()}, unfinished / WEIGHTS, {"format": "pt"}
        )
        config.save_pretrained(unfinished)
        write_json(unfinished / STAMP, dataclasses.asdict(stamp))


def load_adapter(roles: Roles, role: Role, folder: Path, base: Base) -> Stamp:
    """Read a role's adapter and head from a folder; the role is added if it is new.

    Raises:
        UserError: files missing or broken, another base, tokenizer or chat format, another shape.
    """
    stamp = read_stamp(folder)
    expected = stamp_for(role, base)
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
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot be read: {error}", where=str(folder / WEIGHTS), remedy="Train this stage again."
        ) from None
    head = weights.pop(HEAD, None)
    if role not in roles.roles:
        roles.add(role, adapter=bool(weights), head=head is not None)
    targets: dict[str, torch.Tensor] = {f"{PREFIX}{name}": p for name, p in roles.adapter(role).items()}
    if head is not None:
        weights[HEAD], targets[HEAD] = head, roles.head(role).weight
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    fits = shapes == {name: tuple(parameter.shape) for name, parameter in targets.items()}
    if not fits or _scaling(folder) != (roles.lora.r, roles.lora.lora_alpha):
        raise UserError(
            "has another rank, alpha, targets or layers than the recipe's lora section",
            where=str(folder),
            remedy="Set lora.rank, alpha, targets and layers as in its adapter_config.json.",
        )
    for name, parameter in targets.items():
        parameter.data.copy_(weights[name])
    return stamp


def _scaling(folder: Path) -> tuple[int, float]:
    """Rank and alpha: the weights alone do not say by what they are multiplied."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return config["r"], config["lora_alpha"]
    except (OSError, ValueError, KeyError) as error:
        where = str(folder / "adapter_config.json")
        raise UserError(f"cannot be read: {error}", where=where, remedy="Train this stage again.") from None


def read_stamp(folder: Path) -> Stamp:
    """The stamp of an adapter folder.

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


def weights_file_sha256(folder: Path) -> str:
    """SHA-256 of an adapter's weights file: how its children name their parent."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
