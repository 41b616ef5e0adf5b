"""Bottleneck adapters: s · up · f(down · x) added to what a part of a block gives; up is zero at the start.

Letters: N tokens, I the width of what an adapter is given, O of what the part gives, K the bottleneck.
"""

import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from perl.adapters.kind import AdaptedLayer, AdapterKind
from perl.adapters.peft_kind import unmoved
from perl.adapters.targets import adaptable, chosen_layers, layer_index
from perl.errors import UserError
from perl.recipe.adapter import BottleneckSettings

NAMES = {"mlp": ("mlp", "ffn", "feed_forward"), "attention": ("attn", "attention")}
"""What is in the name of a block's part of this kind."""


class Bottleneck(AdapterKind):
    """Adapters on parts of blocks; a subclass says what they are given."""

    settings_type = BottleneckSettings
    mark = "bottleneck_adapter"
    rate_factor = 3.0
    takes_output: ClassVar[bool]
    """Whether an adapter is given what its part gives, or what its part is given."""
    settings: BottleneckSettings

    def __init__(self, lm: PreTrainedModel, settings: BottleneckSettings) -> None:
        super().__init__(lm, settings)
        self._widths = self._choose()
        self.adapted = frozenset(
            name
            for name, weight in lm.named_parameters()
            if weight.dim() > 1 and any(name.startswith(f"{part}.") for part in self._widths)
        )
        self._activation = ACT2FN[settings.activation]

    def __str__(self) -> str:
        return f"{self.settings.kind} adapters of bottleneck {self.settings.bottleneck}"

    def _choose(self) -> dict[str, tuple[int, int]]:
        """The parts that get an adapter, with the widths of what they are given and give.

        Raises:
            UserError: the blocks have no such part, or one of another width than the blocks themselves.
        """
        settings, hidden = self.settings, self.lm.config.get_text_config().hidden_size
        layers = chosen_layers(self.lm, settings.layers, self.section)
        parts: dict[str, list[tuple[int, int]]] = {}
        for name, shape in adaptable(self.lm).items():
            if layer_index(name) in layers:
                parts.setdefault(_part_of(name), []).append(shape)
        wanted = {part: shapes for part, shapes in parts.items() if _wanted(_own_name(part), settings.targets)}
        there = sorted({_own_name(part) for part in parts})
        missing = _missing(settings.targets, there)
        if missing or not wanted:
            raise UserError(
                f"blocks have no part {missing or settings.targets!r}",
                where=f"{self.section}.targets",
                remedy=f"Name some of theirs: {', '.join(there)}.",
            )
        return {part: self._width(part, shapes, hidden) for part, shapes in wanted.items()}

    def _width(self, part: str, shapes: list[tuple[int, int]], hidden: int) -> tuple[int, int]:
        if isinstance(self.lm.get_submodule(part), nn.Linear):
            ((inputs, outputs),) = shapes
            return outputs if self.takes_output else inputs, outputs
        gives = any(outputs == hidden for _, outputs in shapes)
        takes = self.takes_output or any(inputs == hidden for inputs, _ in shapes)
        if not (gives and takes):
            raise UserError(
                f"{part} does not {'give' if takes else 'take'} hidden states",
                where=f"{self.section}.targets",
                remedy="Name parts of a block that do, such as its MLP.",
            )
        return hidden, hidden

    def inject(self, role: str) -> None:
        """Give each part the role's two maps, and at first a hook that adds what they compute."""
        for name, (inputs, outputs) in self._widths.items():
            part = self.lm.get_submodule(name)
            if not hasattr(part, self.mark):
                setattr(part, self.mark, nn.ModuleDict())
                self.removal.callback(delattr, part, self.mark)
                hook = part.register_forward_hook(self._add, with_kwargs=True)
                self.removal.callback(hook.remove)
            device = next(part.parameters()).device
            getattr(part, self.mark)[role] = _Maps(inputs, outputs, self.settings.bottleneck, device)

    def _add(self, part: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        """What a part gives with the active role's adapter."""
        if self.active is None:
            return output
        y = _first(output)
        x = y if self.takes_output else inputs[0] if inputs else named["hidden_states"]
        y = y + self._computed(part, self.active, x)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def _computed(self, part: Any, role: str, x: Tensor) -> Tensor:
        """The output of an adapter, in the dtype of its input."""
        maps = getattr(part, self.mark)[role]
        narrow = self._activation(F.linear(x, maps.down.to(x.dtype)))
        return self.settings.scale * F.linear(narrow, maps.up.to(x.dtype))

    def starting_value(self, name: str) -> float | None:
        """The map up begins at zero, the one down is drawn."""
        return 0.0 if name.endswith("up") else None

    def layers(self, role: str) -> Iterator[AdaptedLayer]:
        """Parts that need nothing but hidden states: no attention."""
        for name, (inputs, _) in self._widths.items():
            part: Any = self.lm.get_submodule(name)
            if not _wanted(_own_name(name), "attention"):
                active = frozenset() if self.active is None else frozenset({self.active})
                added = partial(self._added, part, role)
                yield AdaptedLayer(name, _without_rest(part), _without_rest(part.forward), inputs, added, active)

    @torch.no_grad()
    def _added(self, part: Any, role: str, x_NI: Tensor) -> Tensor:
        given = _first(part.forward(x_NI[None].to(self.lm.dtype)))[0].float() if self.takes_output else x_NI
        return self._computed(part, role, given)

    def ranks_unchanged(self, now: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> int:
        """Units of the bottleneck whose column is as it began in every map up.

        Under relu a unit that no token switched on has no gradient, which is ordinary for short completions.
        """
        if self.settings.activation == "relu":
            return 0
        still = [unmoved(up_OK, start.get(name), 1) for name, up_OK in now.items() if name.endswith("up")]
        return int(torch.stack(still).all(0).sum())


class _Maps(nn.Module):
    """One role's adapter of one part: `down` (K, I) and `up` (O, K), fp32."""

    def __init__(self, inputs: int, outputs: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(width, inputs, device=device))
        self.up = nn.Parameter(torch.zeros(outputs, width, device=device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))


def _first(output: Any) -> Tensor:
    """The hidden states of what a part gives; some give more."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _without_rest(part: Any) -> Any:
    return lambda x: _first(part(x))


def _part_of(name: str) -> str:
    """The part of its block that a module is in: `layers.3.mlp` of `layers.3.mlp.up_proj`.

    Lists are no parts, as they compute nothing: `block.3.layer.1.DenseReluDense` of T5.
    """
    index = f".{layer_index(name)}."
    block, _, inner = name.partition(index)
    in_lists = re.match(r"(?:\w+\.\d+\.)*", inner)
    start = in_lists.end() if in_lists is not None else 0
    return block + index + inner[:start] + inner[start:].partition(".")[0]


def _own_name(part: str) -> str:
    return part.rpartition(".")[2]


def _wanted(own: str, targets: str | list[str]) -> bool:
    if isinstance(targets, list):
        return own in targets
    kinds = NAMES if targets == "both" else (targets,)
    return any(word in own.lower() for kind in kinds for word in NAMES[kind])


def _missing(targets: str | list[str], there: list[str]) -> str:
    """The first kind or name that no part has; empty if all are there."""
    given = targets if isinstance(targets, list) else list(NAMES) if targets == "both" else [targets]
    for one in given:
        if not any(_wanted(own, [one] if isinstance(targets, list) else one) for own in there):
            return one
    return ""


class Series(Bottleneck):
    """Series adapters (Houlsby et al. 2019, arXiv 1902.00751): each transforms what a part of a block gives.

    y + s · up · f(down · y), where y is what a part gives, before it is added to the residual stream.
    """

    takes_output = True


class Parallel(Bottleneck):
    """Parallel adapters (He et al. 2022, arXiv 2110.04366): each computes beside a part of a block.

    y + s · up · f(down · x), where a part is given x and gives y.
    """

    takes_output = False
