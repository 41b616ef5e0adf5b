"""Bottleneck adapters: s · up · f(down · x) is added to the output of a part of a block; up starts at zero.

Letters: N tokens, I the width of an adapter's input, O that of the part's output, K the bottleneck.
"""

import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from perl.adapters.kind import AdaptedLayer, AdapterKind
from perl.adapters.targets import adaptable, chosen_layers, layer_index
from perl.errors import UserError
from perl.recipe.adapter import BottleneckSettings

RATE_SIZE = 32
"""The bottleneck at which `rate_factor` was measured."""
NAMES = {"mlp": ("mlp", "ffn", "feed_forward"), "attention": ("attn", "attention")}
"""Words that occur in the name of a block's part of each kind."""


class Bottleneck(AdapterKind):
    """Adapters on parts of blocks; a subclass defines their input."""

    settings_type = BottleneckSettings
    mark = "bottleneck_adapter"
    rate_factor = 3.0
    takes_output: ClassVar[bool]
    """Whether an adapter's input is its part's output, rather than its part's input."""
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

    @classmethod
    def rate_factor_at(cls, settings: BottleneckSettings) -> float:
        """See `AdapterKind`: Adam moves an output by the rate times the sum over the K units."""
        return cls.rate_factor * min(1.0, RATE_SIZE / settings.bottleneck)

    def __str__(self) -> str:
        return f"{self.settings.kind} adapters with bottleneck {self.settings.bottleneck}"

    def _choose(self) -> dict[str, tuple[int, int]]:
        """Return the parts that get an adapter, with the widths of the adapter's input and the part's output.

        Raises:
            UserError: the blocks have no such part, or its width differs from that of the blocks.
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
                remedy=f"They have {', '.join(there)}.",
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
                f"{part} does not {'return' if takes else 'take'} hidden states",
                where=f"{self.section}.targets",
                remedy="Name parts of a block that do, such as its MLP.",
            )
        return hidden, hidden

    def inject(self, role: str) -> None:
        """Add the role's two maps to each part, and for the first role a hook that adds their output."""
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
        """Return a part's output with the active role's adapter."""
        if self.active is None:
            return output
        y = _first(output)
        x = y if self.takes_output else inputs[0] if inputs else named["hidden_states"]
        y = y + self._adapter_output(part, self.active, x)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def _adapter_output(self, part: Any, role: str, x: Tensor) -> Tensor:
        """Return the output of an adapter, in the dtype of its input."""
        maps = getattr(part, self.mark)[role]
        narrow = self._activation(F.linear(x, maps.down.to(x.dtype)))
        return self.settings.scale * F.linear(narrow, maps.up.to(x.dtype))

    def starting_value(self, name: str) -> float | None:
        """Return zero for `up`; `down` is random."""
        return 0.0 if name.endswith("up") else None

    def layers(self, role: str) -> Iterator[AdaptedLayer]:
        """Yield the parts whose only input is hidden states, i.e. not attention."""
        for name, (inputs, _) in self._widths.items():
            part: Any = self.lm.get_submodule(name)
            if not _wanted(_own_name(name), "attention"):
                active = frozenset() if self.active is None else frozenset({self.active})
                added = partial(self._added, part, role)
                yield AdaptedLayer(name, _states_only(part), _states_only(part.forward), inputs, added, active)

    @torch.no_grad()
    def _added(self, part: Any, role: str, x_NI: Tensor) -> Tensor:
        given = _first(part.forward(x_NI[None].to(self.lm.dtype)))[0].float() if self.takes_output else x_NI
        return self._adapter_output(part, role, given)

    def rank_axis(self, name: str, parameter: Tensor) -> int | None:
        """Return that of the bottleneck's units in `up`.

        Under relu a unit that no token activates has no gradient, which is common with short completions.
        """
        return 1 if name.endswith("up") and self.settings.activation != "relu" else None


class _Maps(nn.Module):
    """One role's adapter of one part: `down` (K, I) and `up` (O, K), fp32."""

    def __init__(self, inputs: int, outputs: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(width, inputs, device=device))
        self.up = nn.Parameter(torch.zeros(outputs, width, device=device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))


def _first(output: Any) -> Tensor:
    """Return the hidden states in a part's output, which may contain more."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _states_only(part: Any) -> Any:
    return lambda x: _first(part(x))


def _part_of(name: str) -> str:
    """Return the part of the block that a module is in: `layers.3.mlp` for `layers.3.mlp.up_proj`.

    Lists do not count as parts, as they compute nothing: in T5, `block.3.layer.1.DenseReluDense` is a part.
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
    """Return the first kind or name that matches no part; empty if all match."""
    given = targets if isinstance(targets, list) else list(NAMES) if targets == "both" else [targets]
    for one in given:
        if not any(_wanted(own, [one] if isinstance(targets, list) else one) for own in there):
            return one
    return ""


class Series(Bottleneck):
    """Series adapters (Houlsby et al. 2019, arXiv 1902.00751): each transforms the output of a part of a block.

    y + s · up · f(down · y), where y is the part's output before it is added to the residual stream.
    """

    takes_output = True


class Parallel(Bottleneck):
    """Parallel adapters (He et al. 2022, arXiv 2110.04366): each computes in parallel with a part of a block.

    y + s · up · f(down · x), where x is the part's input and y its output.
    """

    takes_output = False
