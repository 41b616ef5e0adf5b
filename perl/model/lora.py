"""The shape of the adapters: which modules of a base get one, named one by one."""

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

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
        targets: `attention`, `all-linear` or module names.
        layers: `all`, `top-half` or layer indices.
        lm: the model the adapters are for.

    Raises:
        UserError: no such module or layer in the model.
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
    names = [name for name in linear_layers(lm) if _layer_index(name) in chosen and _wanted(name, targets)]
    if not names:
        available = sorted({name.rsplit(".", 1)[-1] for name in linear_layers(lm)})
        raise UserError(
            f"no module matches {targets!r}",
            where="lora.targets",
            remedy=f"This base has: {', '.join(available)}.",
        )
    transposed = any(type(module).__name__ == "Conv1D" for module in lm.modules())  # GPT-2 stores its weights so
    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, fan_in_fan_out=transposed
    )


def linear_layers(lm: PreTrainedModel) -> list[str]:
    """Names of the linear layers inside the decoder blocks (GPT-2's Conv1D among them)."""
    head = lm.get_output_embeddings()
    return [
        name
        for name, module in lm.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear4bit"))
        and module is not head
        and _layer_index(name) is not None
    ]


def lowest_adapted_layer(lora: LoraConfig) -> int:
    """The lowest block that has an adapter: those below compute alike for all roles."""
    return min(index for name in lora.target_modules or () if (index := _layer_index(name)) is not None)


def without_adapters(lm: PreTrainedModel) -> None:
    """Take every adapter out again: the base has the modules that it was loaded with."""
    for name, layer in list(lm.named_modules()):
        if isinstance(layer, LoraLayer):
            above, _, own = name.rpartition(".")
            setattr(lm.get_submodule(above), own, layer.base_layer)
    vars(lm).pop("peft_config", None)


def _layer_index(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _wanted(name: str, targets: str | list[str]) -> bool:
    if targets == "all-linear":
        return True
    if targets == "attention":
        return "attn" in name or "attention" in name
    return name.rsplit(".", 1)[-1] in targets or name in targets
