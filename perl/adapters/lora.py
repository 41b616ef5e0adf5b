"""The shape of the adapters: which modules and experts of a base get one, named one by one."""

import difflib
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from perl.adapters.experts import expert_parameters
from perl.errors import UserError


def lora_config(
    rank: int,
    alpha: float,
    dropout: float,
    targets: str | list[str],
    layers: str | list[int],
    lm: PreTrainedModel,
) -> LoraConfig:
    """The adapters' shape in peft's terms, with target modules named one by one.

    Args:
        targets: `attention`, `all-linear` (experts included) or names of modules or of experts' parameters.
        layers: `all`, `top-half` or layer indices.
        lm: the model the adapters are for.

    Raises:
        UserError: no such module or layer in the model, or a rank that none of its matrices has.
    """
    count = lm.config.get_text_config().num_hidden_layers
    chosen = {"all": list(range(count)), "top-half": list(range(count // 2, count))}.get(
        layers if isinstance(layers, str) else "", layers
    )
    out_of_range = [index for index in chosen if not 0 <= int(index) < count]
    if out_of_range:
        raise UserError(
            f"no layer {out_of_range[0]}",
            where="lora.layers",
            remedy=f"The base has layers 0 to {count - 1}.",
        )
    shapes = {name: shape for name, shape in adaptable(lm).items() if layer_index(name) in chosen}
    wanted = {name: shape for name, shape in shapes.items() if _wanted(name, targets)}
    _refuse_unmatched(targets, list(shapes), list(wanted))
    _refuse_rank(rank, wanted)
    linear = set(linear_layers(lm))
    experts = [name for name in wanted if name not in linear]
    if experts and dropout:
        raise UserError(
            f"adapters on experts ({experts[0]} and others) have no dropout",
            where="lora.dropout",
            remedy="Set it to 0, or name lora.targets without the experts, such as attention.",
        )
    transposed = any(type(module).__name__ == "Conv1D" for module in lm.modules())  # GPT-2 stores its weights so
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=[name for name in wanted if name in linear],
        target_parameters=experts or None,
        fan_in_fan_out=transposed,
    )


def _refuse_rank(rank: int, wanted: dict[str, tuple[int, int]]) -> None:
    """Refuse a rank above that of every matrix it is to change: it would cost memory and give nothing."""
    highest = max(min(shape) for shape in wanted.values())
    if rank > highest:
        raise UserError(
            f"no matrix that gets an adapter has a rank of {rank}: the largest has {highest}",
            where="lora.rank",
            remedy=f"Give at most {highest}; 1 to 64 is common.",
        )


def _refuse_unmatched(targets: str | list[str], there: list[str], wanted: list[str]) -> None:
    """Refuse targets of which one is no module (or parameter of experts) in the chosen layers."""
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
        where="lora.targets",
        remedy=f"{remedy}This base has: {', '.join(available)}.",
    )


def adaptable(lm: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """What can have an adapter, linear layers and experts' matrices in the blocks, with widths of both sides."""
    found = {}
    for name in linear_layers(lm):
        layer: Any = lm.get_submodule(name)
        conv1d = type(layer).__name__ == "Conv1D"
        found[name] = tuple(layer.weight.shape) if conv1d else (layer.in_features, layer.out_features)
    for name, module in lm.named_modules():
        if layer_index(name) is not None:
            found |= {f"{name}.{own}": tuple(getattr(module, own).shape[1:]) for own in expert_parameters(module)}
    return found


def linear_layers(lm: PreTrainedModel) -> list[str]:
    """Names of the linear layers inside the decoder blocks (GPT-2's Conv1D among them)."""
    head = lm.get_output_embeddings()
    return [
        name
        for name, module in lm.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear4bit"))
        and module is not head
        and layer_index(name) is not None
    ]


def lowest_adapted_layer(lora: LoraConfig) -> int:
    """The lowest block that has an adapter: those below compute alike for all roles."""
    names = (*(lora.target_modules or ()), *(lora.target_parameters or ()))
    return min(index for name in names if (index := layer_index(name)) is not None)


def without_adapters(lm: PreTrainedModel) -> None:
    """Take every adapter out again: the base has the modules that it was loaded with."""
    for name, layer in list(lm.named_modules()):
        above, _, own = name.rpartition(".")
        if isinstance(layer, LoraLayer) and own != "base_layer":  # of experts there are layers inside layers
            setattr(lm.get_submodule(above), own, layer.get_base_layer())
    vars(lm).pop("peft_config", None)


def name_without_lora(name: str) -> str:
    """A weight's name before adapters were put in: peft moves a wrapped layer to `base_layer`, experts twice."""
    return name.replace("base_layer.", "")


def layer_index(name: str) -> int | None:
    """The block that a module or a weight of this name is in; None: in none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _wanted(name: str, targets: str | list[str]) -> bool:
    if targets == "all-linear":
        return True
    if targets == "attention":
        return "attn" in name or "attention" in name
    return name.rsplit(".", 1)[-1] in targets or name in targets
