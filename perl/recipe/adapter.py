"""The sections `adapter` and `lora`: what each role has of its own beside the frozen base."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError

from perl.recipe.section import Positive, Section, nearest

if TYPE_CHECKING:
    from perl.adapters import AdapterKind

LORA = "lora"
REWRITES = "it rewrites the base's weights, which all roles share"
REFUSED = {
    "pissa": REWRITES,
    "olora": REWRITES,
    "corda": REWRITES,
    "loftq": REWRITES,
    "lora_ga": REWRITES,
    "eva": "it starts from activations of the base on training data, which are not collected",
}
"""Ways to start LoRA that peft has, and why they are not here."""


class LoraSettings(Section):
    """LoRA (Hu et al. 2021, arXiv 2106.09685): the same shape for every role."""

    rank: Positive = 8
    """r: rows of A and columns of B."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16
    """The update is alpha / rank · B A."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that are zeroed in the training passes of SFT and of the reward model. Never in
    RL: there the policy that learns has to be the one that sampled. The base's own dropout is off everywhere."""
    targets: Literal["attention", "all-linear"] | list[str] = "all-linear"
    """Modules that get an adapter: attention projections (the paper), all linear layers and experts, or names. The
    share of the blocks' weights that is covered is said at the start and in the report."""
    layers: Literal["all", "top-half"] | list[Annotated[int, Field(ge=0)]] = "all"
    """Blocks that get adapters. What lies below all of them is computed once for all roles."""


class AdapterSettings(Section):
    """Settings of adapters that are not LoRA; a kind with settings of its own has a subclass."""

    kind: str
    """A name in `perl.adapters.ADAPTERS`."""


def _of_its_kind(section: Any) -> Any:
    """Read the section by the settings of its kind."""
    kind = section.get("kind") if isinstance(section, Mapping) else None
    if not isinstance(kind, str):
        return section
    settings = _settings_type(kind)
    try:
        return settings.model_validate(section)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        says = (
            "is no setting" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        )
        raise ValueError(f"{key} {says}: kind {kind} has {', '.join(settings.model_fields)}") from None


def _settings_type(kind: str) -> type[Section]:
    if (why := REFUSED.get(kind.lower().replace("-", "_"))) is not None:
        raise ValueError(f"kind {kind} is not supported, because {why}: use kind {LORA}")
    known = _registered()
    if kind not in known:
        raise ValueError(f"no adapter kind {kind!r}: {nearest(kind, sorted({LORA, *known}))}")
    return known[kind].settings_type


def _registered() -> "dict[str, type[AdapterKind]]":
    """The registry as far as a plugin has imported it: nobody waits for torch to be told of a typing error."""
    module = sys.modules.get("perl.adapters")
    return {} if module is None else module.ADAPTERS


Adapter = Annotated[SerializeAsAny[AdapterSettings], BeforeValidator(_of_its_kind)]


def one_section(recipe: Any) -> Any:
    """A recipe's content in which LoRA is in the section `lora`, and any other kind in `adapter`.

    Raises:
        ValueError: it has both.
    """
    if not isinstance(recipe, Mapping):
        return recipe
    content = {key: value for key, value in recipe.items() if key not in ("adapter", LORA) or value is not None}
    if "adapter" not in content:
        return content
    if LORA in content:
        raise ValueError("lora is short for adapter with kind lora: give one of the two alone")
    section = content["adapter"]
    if isinstance(section, Mapping) and section.get("kind") == LORA:
        del content["adapter"]
        return content | {LORA: {key: value for key, value in section.items() if key != "kind"}}
    return content | {LORA: None}


def section_meant(override: list[str], recipe: Mapping[str, Any]) -> str:
    """The section that an override's key is of: of `lora` and `adapter` the one that the recipe has."""
    section = override[0]
    if section not in (LORA, "adapter") or override == ["adapter", "kind"] or recipe.get(section) is not None:
        return section
    other = "adapter" if section == LORA else LORA
    return other if isinstance(recipe.get(other), dict) else section
