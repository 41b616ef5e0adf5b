"""The parts of a base that can have an adapter, and the choice of them by a recipe."""

import difflib
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from perl.adapters.experts import expert_parameters
from perl.backbones import backbone_of
from perl.errors import UserError


def choose(
    lm: PreTrainedModel, targets: str | list[str], layers: str | list[int], section: str
) -> dict[str, tuple[int, int]]:
    """Return the names of the linear layers and experts' parameters that get an adapter, with (inputs, outputs).

    Args:
        targets: `attention`, `mlp` (all others), `all-linear` (experts included) or names of modules or of
            experts' parameters.
        layers: `all`, `top-half` or layer indices.
        section: the recipe section, for error messages.

    Raises:
        UserError: the model has no such module or layer.
    """
    chosen = chosen_layers(lm, layers, section)
    shapes = {name: shape for name, shape in adaptable(lm).items() if layer_index(name) in chosen}
    wanted = {name: shape for name, shape in shapes.items() if _wanted(name, targets)}
    _refuse_unmatched(targets, list(shapes), list(wanted), section)
    return wanted


def chosen_layers(lm: PreTrainedModel, layers: str | list[int], section: str) -> list[int]:
    """Return the indices of the blocks that get an adapter; arguments and errors are those of `choose`."""
    count = backbone_of(lm.config).depth
    chosen: list[int] = {"all": list(range(count)), "top-half": list(range(count // 2, count))}.get(
        layers if isinstance(layers, str) else "", list(map(int, layers)) if isinstance(layers, list) else []
    )
    out_of_range = [index for index in chosen if not 0 <= index < count]
    if out_of_range:
        raise UserError(
            f"no layer {out_of_range[0]}",
            where=f"{section}.layers",
            remedy=f"The base has layers 0 to {count - 1}.",
        )
    return chosen


def _wanted(name: str, targets: str | list[str]) -> bool:
    if targets == "all-linear":
        return True
    if targets in ("attention", "mlp"):
        return ("attn" in name or "attention" in name.lower()) == (targets == "attention")
    return not {name.rsplit(".", 1)[-1], in_a_block(name), name}.isdisjoint(targets)


def _refuse_unmatched(targets: str | list[str], there: list[str], wanted: list[str], section: str) -> None:
    """Refuse targets if one matches no module (or experts' parameter) in the chosen layers."""
    given = [targets] if isinstance(targets, str) else targets
    unmatched = [
        one for one in given if isinstance(targets, list) and not any(_wanted(name, [one]) for name in there)
    ]
    if wanted and not unmatched:
        return
    available = sorted({name.rsplit(".", 1)[-1] for name in there})
    near = difflib.get_close_matches(unmatched[0], available, n=1) if unmatched else []
    remedy = f"Did you mean {near[0]}? " if near else ""
    raise UserError(
        f"no module matches {unmatched[0] if unmatched else targets!r}",
        where=f"{section}.targets",
        remedy=f"{remedy}This base has: {', '.join(available)}.",
    )


def adaptable(lm: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return all linear layers and experts' matrices in the blocks, by name, with (inputs, outputs)."""
    found = {}
    for name in linear_layers(lm):
        layer: Any = lm.get_submodule(name)
        conv1d = type(layer).__name__ == "Conv1D"
        found[name] = tuple(layer.weight.shape) if conv1d else (layer.in_features, layer.out_features)
    for name, module in modules_in_blocks(lm).items():
        found |= {f"{name}.{own}": tuple(getattr(module, own).shape[1:]) for own in expert_parameters(module)}
    return found


def linear_layers(lm: PreTrainedModel) -> list[str]:
    """Return the names of the linear layers inside the blocks (including GPT-2's Conv1D)."""
    return [name for name, module in modules_in_blocks(lm).items() if _is_linear(module)]


def modules_in_blocks(lm: PreTrainedModel) -> dict[str, nn.Module]:
    """Return all modules inside the blocks, by name; not those of a part that reads images."""
    inside = set(backbone_of(lm.config).text_model(lm).modules())
    named = lm.named_modules()
    return {name: module for name, module in named if layer_index(name) is not None and module in inside}


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer; routers of experts may subclass it but return several tensors."""
    name = type(module).__name__
    return (isinstance(module, nn.Linear) and "Router" not in name) or name in ("Conv1D", "Linear4bit")


def layer_index(name: str) -> int | None:
    """Return the index of the block that a module or weight of this name is in; None if it is in none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def in_a_block(name: str) -> str:
    """Return a name as seen from its block: `mlp.down_proj` for `model.layers.3.mlp.down_proj`."""
    return name.partition(f".{layer_index(name)}.")[2]


def has_transposed_weights(lm: PreTrainedModel) -> bool:
    """Return whether linear layers store their weights as (inputs, outputs), as in GPT-2."""
    return any(type(module).__name__ == "Conv1D" for module in lm.modules())
