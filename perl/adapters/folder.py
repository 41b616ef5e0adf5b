"""A folder with an adapter that peft or another run has trained: its kind and settings, and which are refused.

A recipe that names one (`sft.adapter: DIR`) gets the kind and the shape from the folder's configuration.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from perl.adapters import ADAPTERS
from perl.adapters.kind import CONFIG, AdapterKind
from perl.adapters.peft_kind import PeftKind
from perl.adapters.targets import in_a_block, layer_index
from perl.errors import UserError, machine_fault
from perl.recipe.adapter import LORA, REFUSED

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Prefix of the names of tensors on disk."""
STARTS = ("gaussian", "eva", "orthogonal")
"""Named initializations of LoRA that leave the base unchanged."""
PLACES = ("targets", "layers")
"""Settings that can be compared only on a model."""


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk.

    Attributes:
        where: the recipe's key and the folder, for messages.
        config: the content of its adapter_config.json.
        settings: the equivalent recipe section of this kind, without `kind`.
        names: the names of its tensors.
    """

    path: Path
    where: str
    config: Mapping[str, Any]
    kind: str
    settings: Mapping[str, Any]
    names: Sequence[str]

    def refuse_conflicts(self, kind: str, said: Mapping[str, Any], by: str = "the recipe") -> None:
        """Compare the folder with a recipe's settings.

        Args:
            kind: of the recipe's adapters.
            said: the keys set in their section; omitted keys do not conflict.
            by: source of these settings: the recipe itself, or the folder that another stage starts from.

        Raises:
            UserError: there is a conflict; the message names both sides of the first one.
        """
        section = LORA if kind == LORA else "adapter"
        conflicts = [("kind", kind, self.kind)] if kind != self.kind else []
        conflicts += [
            (key, said[key], value)
            for key, value in self.settings.items()
            if key in said and key not in PLACES and said[key] != value
        ]
        for key, here, there in conflicts:
            free, name = (section, "adapter.kind") if key == "kind" else (f"{section}.{key}",) * 2
            raise UserError(
                f"the adapter has {key} {there}, but {by} sets {name}: {here}",
                where=self.where,
                remedy=f"Use another folder, or remove {free} from the recipe, so that the folder defines it. All "
                "roles of a run have adapters of one kind and shape.",
            )


def read_adapter_folder(path: Path, where: str) -> AdapterFolder:
    """Read an adapter's configuration and names of tensors from disk, but not its weights.

    Args:
        where: the recipe key that names it.

    Raises:
        UserError: there is no such folder, its files are broken or pickled, or the kind is not supported.
    """
    where = f"{where}: {path}"
    if not (path / CONFIG).is_file():
        raise UserError(
            f"no adapter: there is no {CONFIG}",
            where=where,
            remedy="Name the folder that peft's save_pretrained wrote, or RUN/ROLE/adapter of a run.",
        )
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
        kind = _kind(config, where)
        names = _tensor_names(path, where)
        settings = _settings(config, kind, names)
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise machine_fault(error) or UserError(
            f"the adapter cannot be read: {error}", where=where, remedy="Save or download it again."
        ) from None
    return AdapterFolder(path, where, config, kind, settings, names)


def _kind(config: Mapping[str, Any], where: str) -> str:
    """Return the kind of adapter, by its name in a recipe.

    Raises:
        UserError: the kind is not supported, with the reason if there is a specific one.
    """
    given = str(config.get("peft_type") or config.get("kind")).lower()
    start = config.get("init_lora_weights", True)
    start = "kasa" if config.get("kasa_config") else start
    if isinstance(start, str) and start not in STARTS:  # pissa_niter_16 is PiSSA
        given = next((kind for kind in REFUSED if start.lower().startswith(kind)), start)
    elif given == LORA:
        given = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else LORA
    if given in ADAPTERS and given not in REFUSED:
        return given
    why = f", because {REFUSED[given]}" if given in REFUSED else ""
    raise UserError(
        f"adapters of kind {given} are not supported{why}",
        where=where,
        remedy=f"Supported kinds: {', '.join(ADAPTERS)}.",
    )


def _tensor_names(path: Path, where: str) -> list[str]:
    pickles = sorted(pickle.name for pickle in path.glob("*.bin"))
    if pickles and not (path / WEIGHTS).exists():
        raise UserError(
            f"its weights are in {pickles[0]}, and pickles are never read",
            where=where,
            remedy="Load it where you trust it, and save it with save_pretrained, which writes safetensors.",
        )
    with safe_open(path / WEIGHTS, framework="pt") as file:
        return list(file.keys())


def _settings(config: Mapping[str, Any], kind: str, names: Iterable[str]) -> dict[str, object]:
    """Return the equivalent recipe settings.

    Raises:
        ValueError: there are none.
    """
    row = ADAPTERS[kind]
    if issubclass(row, PeftKind):
        settings = {key: config[name] for key, name in row.in_peft.items() if name in config}
        settings |= _places(config, names, row)
    else:
        settings = {key: config[key] for key in config.keys() - {"kind"}}
    named = {"kind": kind} if "kind" in row.settings_type.model_fields else {}
    try:
        row.settings_type.model_validate(named | settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return settings


def _places(config: Mapping[str, Any], names: Iterable[str], row: type[AdapterKind]) -> dict[str, object]:
    """Return the equivalent `targets` and `layers`, with short names of modules where they are sufficient.

    They are if the configuration itself has them; otherwise a block may have another module of that name, as BERT
    and GPT-2 do (`dense`, `c_proj`), and they begin at the block.
    """
    given = config.get("target_modules") or []
    named = [*given, *(config.get("target_parameters") or [])]
    if isinstance(given, str) or any(layer_index(name) is None for name in named):  # then the tensors tell
        own = (name.removeprefix(PREFIX).partition(f".{row.mark}") for name in names)
        named = [module for module, mark, _ in own if mark and layer_index(module) is not None]
    layers: dict[str, list[int]] = {}
    listed = [] if isinstance(given, str) else given
    for module in set(named):
        if (index := layer_index(module)) is not None:
            short = module.rpartition(".")[2]
            layers.setdefault(short if short in listed else in_a_block(module), []).append(index)
    first, *others = [sorted(indices) for indices in layers.values()] or [[]]
    if len(set(first)) == len(first) and all(indices == first for indices in others):
        return {"targets": sorted(layers), "layers": first}
    return {"targets": sorted(set(named)), "layers": "all"}
