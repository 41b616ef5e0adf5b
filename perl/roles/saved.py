"""Roles on disk, in the formats of the libraries that read them, with a stamp that identifies their base.

adapter_config.json  adapter_model.safetensors   an adapter in peft's format; a head is the module `score`
config.json          model.safetensors           under full tuning: a whole model in transformers' format
perl.json                                        the stamp: provenance, and a reward model's scale
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from perl import __version__
from perl.adapters.kind import CONFIG
from perl.backbones.base import Base
from perl.errors import UserError, machine_fault
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.roles.score_terms import SCORE_TERMS
from perl.roles.shared_base import SharedBase
from perl.system.files import file_sha256, whole_folder, write_json, write_tensors

HEAD = "score.weight"
STAMP = "perl.json"


@dataclass(frozen=True)
class Stamp:
    """The provenance of a role's weights; loading them on another base, tokenizer etc. is refused."""

    role: Role
    base: str
    base_sha256: str
    tokenizer_sha256: str
    chat_sha256: str
    end_id: int
    recipe: str | None = None
    """Name of the recipe that trained the role; None if none did."""
    recipe_sha256: str | None = None
    """SHA-256 of the recipe keys that its stage depends on."""
    data_sha256: str | None = None
    """SHA-256 of the rows that it was trained and evaluated on."""
    parent: Role | None = None
    """The role that this one started from, if that was trained."""
    parent_sha256: str | None = None
    """SHA-256 of the parent's weights file."""
    started_from: str | None = None
    """Folder of the existing adapter that its stage started from."""
    started_sha256: str | None = None
    """SHA-256 of that folder's weights file."""
    reward_is_probability: bool = False
    """Whether the score is the log-odds of a thumbs up; RL's reward is then the probability."""
    reward_mean: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    reward_std: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Mean and standard deviation of the reward on training rows, with which RL normalizes."""
    perl: str = __version__


def stamp_for(role: Role, base: Base, **more: Any) -> Stamp:
    """Return the stamp of a role trained now on this base."""
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
    """Write a folder with a role's weights and head, all or nothing."""
    scores = role in roles.heads
    with whole_folder(folder) as unfinished:
        write_tensors(unfinished / roles.weights_file, tensors_on_disk(roles, role))
        with roles.role(role if roles.weights(role) else roles.reference):
            roles.write_config(unfinished, stamp.base, scores=scores)
        write_json(unfinished / STAMP, dataclasses.asdict(stamp))


def tensors_on_disk(roles: Roles, role: Role) -> dict[str, torch.Tensor]:
    """Return a role's weights and head, by their names on disk."""
    head = roles.head_weights(role) if role in roles.heads else {}
    computed = dict(roles.score_terms[role].named_buffers()) if role in roles.score_terms else {}
    return {f"{roles.prefix}{name}": one for name, one in {**roles.weights(role), **head, **computed}.items()}


def load_role(
    roles: Roles,
    role: Role,
    folder: Path,
    base: Base,
    recipe: str | None = None,
    recipe_sha256: str | None = None,
) -> None:
    """Read a role's weights and head from a folder; the role is added if it is new.

    Args:
        recipe: name of the recipe, if the role must be from it; `recipe_sha256` is its hash.

    Raises:
        UserError: files are missing or broken, or the weights have another shape or belong to another base,
            tokenizer, chat format, recipe or parent.
    """
    stamp = read_stamp(folder)
    _check_stamp(roles, stamp, stamp_for(role, base, recipe=recipe, recipe_sha256=recipe_sha256), folder)
    weights = read_weights(folder, roles.weights_file, _retrain_remedy(folder))
    if role not in roles.roles:
        head = tuple(f"{roles.prefix}{part}" for part in (HEAD, *(f"{term}." for term in SCORE_TERMS)))
        own = any(not name.startswith(head) for name in weights)
        roles.add(role, weights=own, head=role.has_head)
    targets = tensors_on_disk(roles, role)
    with roles.role(role):
        differs = shape_difference(weights, targets)
        if differs or not _config_fits(roles, folder):
            raise _settings_error(roles, folder, differs)
    with torch.no_grad():
        for name, parameter in targets.items():
            parameter.copy_(weights[name])


def _settings_error(roles: Roles, folder: Path, differs: str) -> UserError:
    if not isinstance(roles, SharedBase):
        what = f"is another kind of model than the recipe's base{differs}"
        return UserError(what, where=str(folder), remedy=f"Use the base that {STAMP} names.")
    section, (*keys, last) = roles.adapter.section, roles.adapter.shape
    return UserError(
        f"has another {', '.join(keys)} or {last} than the recipe's {section} section{differs}",
        where=str(folder),
        remedy=f"Set {section}.{', '.join(keys)} and {last} as in its {CONFIG}.",
    )


def read_weights(folder: Path, file: str, remedy: str) -> dict[str, torch.Tensor]:
    """Return the tensors in a folder's safetensors file.

    Raises:
        UserError: the file cannot be read; with the given remedy.
    """
    try:
        return load_file(folder / file)
    except (OSError, SafetensorError, MemoryError) as error:
        pickles = sorted(pickle.name for pickle in folder.glob("*.bin"))
        also = f"; there is {pickles[0]}, but pickles are never read" if pickles else ""
        raise machine_fault(error) or UserError(
            f"cannot be read: {error}{also}", where=str(folder / file), remedy=remedy
        ) from None


def shape_difference(weights: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> str:
    """Describe the first tensor whose shape differs; empty if there is none."""
    for name in sorted({*weights, *targets}):
        there, here = (tuple(of[name].shape) if name in of else "missing" for of in (weights, targets))
        if there != here:
            return f": {name} is {there}, here {here}"
    return ""


def _check_stamp(roles: Roles, stamp: Stamp, here: Stamp, folder: Path) -> None:
    """Compare a stamp with the one that would be written here, and raise an error that names all differences."""
    compared = [
        ("role", stamp.role, here.role),
        ("base", stamp.base_sha256, here.base_sha256),
        ("tokenizer", stamp.tokenizer_sha256, here.tokenizer_sha256),
        ("chat format", stamp.chat_sha256, here.chat_sha256),
        ("end-of-turn token", stamp.end_id, here.end_id),
    ]
    if here.recipe_sha256 is not None:
        compared.append(("recipe", stamp.recipe_sha256, here.recipe_sha256))
    if stamp.parent is not None:
        parent_folder = folder.parent.parent / stamp.parent / folder.name
        if (parent_folder / roles.weights_file).exists():
            compared.append((f"parent {stamp.parent}", stamp.parent_sha256, weights_sha256(roles, parent_folder)))
    differs = [
        f"{what} (it says {str(there)[:12]}, here {str(ours)[:12]})"
        for what, there, ours in compared
        if there != ours
    ]
    if differs:
        trained = f"{stamp.base}{f' by recipe {stamp.recipe}' if stamp.recipe else ''}"
        raise UserError(
            f"belongs to another {', another '.join(differs)}; it was trained on {trained}",
            where=str(folder),
            remedy=f"Use it as its {STAMP} says; to train it here, remove {folder.parent} and run the recipe.",
        )


def _retrain_remedy(folder: Path) -> str:
    """Return the remedy for damaged files."""
    stage = folder.parent.parent if folder.parent.name.startswith("member-") else folder.parent
    return f"Remove {stage / 'result.json'} and run the recipe: it continues from its newest checkpoint."


def _config_fits(roles: Roles, folder: Path) -> bool:
    try:
        return roles.config_fits(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise machine_fault(error) or UserError(
            f"its configuration cannot be read: {error}", where=str(folder), remedy=_retrain_remedy(folder)
        ) from None


def read_stamp(folder: Path, remedy: str = "") -> Stamp:
    """Read the stamp in a role's folder.

    Raises:
        UserError: no such folder, or not written by PERL; with the given remedy, or that for run folders.
    """
    remedy = remedy or _retrain_remedy(folder)
    try:
        return TypeAdapter(Stamp).validate_json((folder / STAMP).read_bytes())
    except FileNotFoundError:
        what = f"has no {STAMP}: it was not written by PERL"
        raise UserError(what, where=str(folder), remedy=remedy) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = f"not a stamp: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        raise UserError(what, where=str(folder / STAMP), remedy=remedy) from None
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
        raise machine_fault(error) or UserError(what, where=str(folder / STAMP), remedy=remedy) from None


def weights_sha256(roles: Roles, folder: Path) -> str:
    """Return the SHA-256 of a role's weights file, which identifies a parent in other roles' stamps."""
    return file_sha256(folder / roles.weights_file)
