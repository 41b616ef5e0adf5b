"""The sections `adapter` and `lora`: the weights that each role has in addition to the frozen base."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError

from perl.recipe.section import Positive, Section, nearest

if TYPE_CHECKING:
    from perl.adapters import AdapterKind

LORA = "lora"
REWRITES = "it rewrites the base's weights, which all roles share"
VIRTUAL_TOKENS = "it puts virtual tokens before the text, which no reward model, critic or sampler here supports"
REFUSED = {
    "pissa": REWRITES,
    "olora": REWRITES,
    "corda": REWRITES,
    "loftq": REWRITES,
    "lora_ga": REWRITES,
    "kasa": REWRITES,
    "osf": REWRITES,
    "eva": "it starts from activations of the base on training data, which are not collected",
    "adalora": "it moves ranks between the layers of a single trained adapter; policy and critic are two",
    "prompt_tuning": VIRTUAL_TOKENS,
    "multitask_prompt_tuning": VIRTUAL_TOKENS,
    "p_tuning": VIRTUAL_TOKENS,
    "prefix_tuning": VIRTUAL_TOKENS,
}
"""Kinds of adapters and LoRA initializations of peft that are not supported, and why."""


def adapter_label(kind: str) -> str:
    """Return the display name of a kind."""
    return "LoRA" if kind == LORA else kind


Targets = Literal["attention", "mlp", "all-linear"] | list[str]
Layers = Literal["all", "top-half"] | list[Annotated[int, Field(ge=0)]]


class LoraSettings(Section):
    """LoRA (Hu et al. 2021, arXiv 2106.09685): the same shape for every role."""

    rank: Positive = 8
    """Rank r: the number of rows of A and of columns of B."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16
    """The update is alpha / rank · B A."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that are zeroed when SFT and the reward model are trained. Not used in RL,
    where the policy in training must be the one that sampled. The base's own dropout is always off."""
    targets: Targets = "all-linear"
    """Modules that get an adapter: attention projections (as in the paper), the other linear layers and experts,
    all of these, or names. Console and report show the share of the blocks' weights that is covered."""
    layers: Layers = "all"
    """Blocks that get adapters. The blocks below the lowest of them are computed once for all roles."""
    b_learning_rate_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """LoRA+ (Hayou et al. 2024, arXiv 2402.12354): factor on the learning rate of B, which starts at zero. The
    paper uses 16; the update of a LoRA layer then depends less on the model's width."""


class AdapterSettings(Section):
    """Settings of adapters other than LoRA; a kind with its own settings has a subclass."""

    four_bit_refusal: ClassVar[str | None] = None
    """Why a 4-bit base cannot have such an adapter; None: it can."""
    kind: str
    """A name in `perl.adapters.ADAPTERS`."""


class LayeredSettings(AdapterSettings):
    """Settings of adapters in selected blocks."""

    layers: Layers = "all"
    """Blocks that get adapters."""


class TargetedSettings(LayeredSettings):
    """Settings of adapters on selected modules."""

    targets: Targets = "all-linear"
    """As for LoRA."""


class RsLoraSettings(AdapterSettings, LoraSettings):
    """rsLoRA (Kalajdzievski 2023, arXiv 2312.03732): LoRA whose scale is alpha / sqrt(rank)."""


class DoraSettings(AdapterSettings, LoraSettings):
    """DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA on the directions of a weight's rows, and trained lengths."""

    four_bit_refusal = "each pass takes the norms of whole weights"


class Ia3Settings(LayeredSettings):
    """(IA)³ (Liu et al. 2022, arXiv 2205.05638): a learned factor on each output, or on each input, of a layer."""

    targets: Literal["published"] | Targets = "published"
    """published: the modules in peft's table for this architecture, which follows the paper: two attention
    projections, and the inputs of the MLP's last layer. Otherwise as for LoRA."""


class VeraSettings(TargetedSettings):
    """VeRA (Kopiczko et al. 2023, arXiv 2310.11454): trained vectors around two shared random matrices."""

    rank: Positive = 256
    """Size of the random matrices' narrow side."""
    projection_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the random matrices, which are generated again whenever an adapter is loaded."""


class MissSettings(TargetedSettings):
    """MiSS (Kang and Yin 2024, arXiv 2409.15371): each output adds a trained mix of sums over the inputs."""

    rank: Positive = 64
    """Number of sums over the inputs that each output mixes."""


class BottleneckSettings(LayeredSettings):
    """Two linear maps through a narrow layer; the defaults are those of LLM-Adapters (arXiv 2304.01933)."""

    bottleneck: Positive = 256
    """Width of the narrow layer."""
    activation: Literal["tanh", "relu", "gelu", "silu"] = "tanh"
    """Activation function between the two linear maps."""
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Factor on the adapter's output; He et al. 2022 use 4 for parallel adapters."""
    targets: Literal["mlp", "attention", "both"] | list[str] = "mlp"
    """Parts of a block that get an adapter: the MLP, the attention, both, or names within a block."""


class TinyLoraSettings(TargetedSettings):
    """TinyLoRA (arXiv 2602.04118): a few weights per layer, which mix random matrices between singular vectors."""

    four_bit_refusal = "it starts from the singular vectors of whole weights"
    rank: Positive = 2
    """Rank of the decomposition of each weight, which is fixed."""
    size: Positive = 64
    """Trained weights per group of layers."""
    weight_tying: Annotated[float, Field(ge=0, le=1)] = 0.0
    """0: each layer is a group; 1: all layers are one group."""
    projection_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the random matrices."""


class PrefixSettings(LayeredSettings):
    """Prefix tuning (Li and Liang 2021, arXiv 2101.00190) with the gates of LLaMA-Adapter (arXiv 2303.16199)."""

    length: Positive = 10
    """Trained keys and values per head; LLM-Adapters uses 10."""


BUILT_IN: dict[str, type[AdapterSettings]] = {
    "rslora": RsLoraSettings,
    "dora": DoraSettings,
    "ia3": Ia3Settings,
    "vera": VeraSettings,
    "miss": MissSettings,
    "series": BottleneckSettings,
    "parallel": BottleneckSettings,
    "tinylora": TinyLoraSettings,
    "prefix": PrefixSettings,
}
"""Settings of the kinds in `perl.adapters.ADAPTERS` other than LoRA, for callers that do not import torch."""


def all_settings() -> set[str]:
    """Return the names of the settings of LoRA and of all kinds in `BUILT_IN`."""
    return {*LoraSettings.model_fields, *(name for kind in BUILT_IN.values() for name in kind.model_fields)}


def _of_its_kind(section: Any) -> Any:
    """Validate the section with the settings of its kind."""
    kind = section.get("kind") if isinstance(section, Mapping) else None
    if not isinstance(kind, str):
        return section
    settings = settings_of_kind(kind)
    try:
        return settings.model_validate(section)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        says = (
            "is no setting" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        )
        raise ValueError(f"{key} {says}: kind {kind} has {', '.join(settings.model_fields)}") from None


def settings_of_kind(kind: str) -> type[Section]:
    if (why := REFUSED.get(kind.lower().replace("-", "_"))) is not None:
        raise ValueError(f"kind {kind} is not supported, because {why}: use kind {LORA}")
    known = BUILT_IN | {name: row.settings_type for name, row in _registered().items()}
    if kind not in known:
        raise ValueError(f"no adapter kind {kind!r}: {nearest(kind, sorted({LORA, *known}))}")
    return known[kind]


def _registered() -> "dict[str, type[AdapterKind]]":
    """Return the registry if a plugin has imported it; a typo should not have to wait for torch."""
    module = sys.modules.get("perl.adapters")
    return {} if module is None else module.ADAPTERS


Adapter = Annotated[SerializeAsAny[AdapterSettings], BeforeValidator(_of_its_kind)]


def one_section(recipe: Any) -> Any:
    """Return a recipe's content with LoRA in the section `lora`, and any other kind in `adapter`.

    Raises:
        ValueError: it has both.
    """
    if not isinstance(recipe, Mapping):
        return recipe
    content = {key: value for key, value in recipe.items() if key not in ("adapter", LORA) or value is not None}
    if "adapter" not in content:
        return content
    if LORA in content:
        raise ValueError("lora is short for adapter with kind lora: give only one of the two")
    section = content["adapter"]
    if isinstance(section, Mapping) and section.get("kind") == LORA:
        del content["adapter"]
        return content | {LORA: {key: value for key, value in section.items() if key != "kind"}}
    return content | {LORA: None}


def section_meant(override: list[str], recipe: dict[str, Any]) -> str:
    """Return the section that an override refers to: of `lora` and `adapter` the one that the recipe has.

    An override of a whole section is taken literally. `adapter.kind` turns a recipe's `lora` into `adapter`.
    """
    section = override[0]
    if section not in (LORA, "adapter") or len(override) == 1 or recipe.get(section) is not None:
        return section
    other = "adapter" if section == LORA else LORA
    if not isinstance(recipe.get(other), dict):
        return section
    if override == ["adapter", "kind"]:
        recipe["adapter"] = recipe.pop(LORA)
        return section
    return other
