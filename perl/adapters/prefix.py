"""Prefix tuning: learned keys and values that every query of a block also attends to (Li and Liang 2021).

o + rms(o) * tanh(g) * softmax(q Kᵀ / √H) V, where o = attention(x), before the block's output projection. The
separate softmax and the gate g per head, zero at the start, are from LLaMA-Adapter (Zhang et al. 2023): in one
softmax with the text, a prefix would change the base's output before anything is learned. The keys have no
position, and the queries are taken before rotation, so positions, masks and the KV cache are unaffected.

Unlike in LLaMA-Adapter, a prefix is measured in units of the attention's own output at each position, so that one
learning rate suits every base and block. The size of these outputs differs by a factor of a hundred: in the first
block of a model without a norm before attention, such as OLMo 2, they are as small as the embeddings, and the norm
after attention would turn the first step of an absolute prefix into most of the block's output.

Letters: B rows, N positions, P prefix length, G key-value heads, S query heads per key-value head, H width of a
head, D width of the model.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from perl.adapters.kind import AdaptedLayer, AdapterKind
from perl.adapters.targets import chosen_layers, layer_index, modules_in_blocks
from perl.backbones import backbone_of
from perl.errors import UserError
from perl.recipe.adapter import PrefixSettings

OUTPUTS = ("o_proj", "out_proj", "dense")
"""Possible names of the output projection."""
TINY = 1e-12
"""Added to a mean square, so that its root has a gradient where attention's output is 0, as on padding."""


class Prefix(AdapterKind):
    """A prefix per role in every chosen block."""

    settings_type = PrefixSettings
    mark = "prefix_adapter"
    rate_factor = 35.0
    settings: PrefixSettings

    def __init__(self, lm: PreTrainedModel, settings: PrefixSettings) -> None:
        super().__init__(lm, settings)
        longest = backbone_of(lm.config).context_length(lm)
        if settings.length > longest:
            raise UserError(
                f"a prefix of {settings.length} positions is longer than the base's context of {longest}",
                where="adapter.length",
                remedy="Published prefixes have 5 to 200 positions; 10 is LLM-Adapters' setting.",
            )
        config = lm.config.get_text_config()
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        self._sites = {name: _site(lm, name, heads, groups) for name in _attention(lm, settings.layers)}
        self.adapted = frozenset(
            name
            for name, weight in lm.named_parameters()
            if weight.dim() > 1 and any(name.startswith(f"{site}.") for site in self._sites)
        )

    def __str__(self) -> str:
        return f"prefixes of length {self.settings.length}"

    def inject(self, role: str) -> None:
        """Add the role's prefix to each attention, and for the first role hooks that let queries attend to it."""
        for name, site in self._sites.items():
            attention = self.lm.get_submodule(name)
            if not hasattr(attention, self.mark):
                setattr(attention, self.mark, nn.ModuleDict())
                self.removal.callback(delattr, attention, self.mark)
                state = _Queries()
                self.removal.callback(site.query.register_forward_hook(partial(self._keep_queries, state)).remove)
                add = partial(self._add, attention, site, state)
                self.removal.callback(site.output.register_forward_pre_hook(add).remove)
            device = next(attention.parameters()).device
            getattr(attention, self.mark)[role] = _Learned(site, self.settings.length, device)

    def _keep_queries(self, state: "_Queries", layer: nn.Module, inputs: Any, q: Tensor) -> None:
        """Keep the queries until the output projection of the same forward."""
        state.q = None if self.active is None else q

    def _add(self, attention: Any, site: "_Site", state: "_Queries", layer: nn.Module, inputs: Any) -> Any:
        """Return the output projection's input plus what the active role's prefix adds."""
        q, state.q = state.q, None
        if q is None or self.active is None:
            return None
        o = inputs[0]
        added = site.attend(getattr(attention, self.mark)[self.active], q).view_as(o)
        return (o + _size(o).to(o.dtype) * added, *inputs[1:])

    def starting_value(self, name: str) -> float | None:
        """Return zero for the gates; keys and values are random."""
        return 0.0 if name.endswith("gate") else None

    def layers(self, role: str) -> Iterator[AdaptedLayer]:
        """Yield the two projections, without the attention to the text between them."""
        active = frozenset() if self.active is None else frozenset({self.active})
        for name, site in self._sites.items():
            learned = getattr(self.lm.get_submodule(name), self.mark)[role]
            yield AdaptedLayer(
                name,
                lambda x, site=site: site.output(site.query(x)),  # type: ignore[misc]
                lambda x, site=site: site.output.forward(site.query.forward(x)),  # type: ignore[misc]
                site.inputs,
                partial(self._added, site, learned),
                active,
            )

    @torch.no_grad()
    def _added(self, site: "_Site", learned: "_Learned", x_ND: Tensor) -> Tensor:
        """Compute it by definition, one head at a time: (N, D), fp32."""
        q_NQ = site.query.forward(x_ND.to(self.lm.dtype)).float()
        heads = []
        for head, q_NH in enumerate(q_NQ.split(site.width, 1)):
            group = head // (site.heads // site.groups)
            k_PH, v_PH = learned.keys[group], learned.values[group]
            heads.append(learned.relative_gate[head].tanh() * (q_NH @ k_PH.T / site.width**0.5).softmax(1) @ v_PH)
        o_NQ = (_size(q_NQ) * torch.cat(heads, 1)).to(self.lm.dtype)
        zero: Tensor = site.output.forward(torch.zeros_like(o_NQ))
        added_ND: Tensor = (site.output.forward(o_NQ) - zero).float()
        return added_ND


def _size(o: Tensor) -> Tensor:
    """Return the root mean square of attention's output at each position: (..., 1), fp32."""
    return (o.float().square().mean(-1, keepdim=True) + TINY).sqrt()


class _Queries:
    """The queries of the forward pass in progress."""

    q: Tensor | None = None


class _Site(NamedTuple):
    """The query and output projections of one attention, and its heads."""

    query: Any
    output: Any
    inputs: int
    """Width of the hidden states."""
    heads: int
    groups: int
    """Number of key-value heads, G."""
    width: int
    """Width of a head, H."""

    def attend(self, learned: "_Learned", q: Tensor) -> Tensor:
        """Return what a prefix adds, in units of attention's output; as the queries: dtype and (..., G S H)."""
        q_NGSH = q.view(-1, self.groups, self.heads // self.groups, self.width)
        keys_GPH, values_GPH = learned.keys.to(q.dtype), learned.values.to(q.dtype)
        scores = torch.einsum("ngsh,gph->ngsp", q_NGSH, keys_GPH).float() / self.width**0.5
        o_NGSH = torch.einsum("ngsp,gph->ngsh", scores.softmax(-1).to(q.dtype), values_GPH)
        gate_GS1 = learned.relative_gate.tanh().to(q.dtype).view(self.groups, -1, 1)
        return (gate_GS1 * o_NGSH).reshape(q.shape)


class _Learned(nn.Module):
    """One role's prefix of one attention, fp32: `keys` and `values` (G, P, H), and `relative_gate` (G S)."""

    def __init__(self, site: _Site, length: int, device: torch.device) -> None:
        super().__init__()
        self.keys, self.values = (
            nn.Parameter(torch.randn(site.groups, length, site.width, device=device)) for _ in range(2)
        )
        self.relative_gate = nn.Parameter(torch.zeros(site.heads, device=device))


def _attention(lm: PreTrainedModel, layers: str | list[int]) -> list[str]:
    """Return the names of the chosen blocks' attention modules, which must have a separate query projection."""
    chosen = chosen_layers(lm, layers, "adapter")
    found = [name.removesuffix(".q_proj") for name in modules_in_blocks(lm) if name.endswith(".q_proj")]
    found = [name for name in found if layer_index(name) in chosen]
    if {layer_index(name) for name in found} != set(chosen):
        raise _unsupported(lm, "not every block has attention with a layer q_proj")
    return found


def _site(lm: PreTrainedModel, name: str, heads: int, groups: int) -> _Site:
    attention: Any = lm.get_submodule(name)
    output = next((layer for own in OUTPUTS if (layer := getattr(attention, own, None)) is not None), None)
    width = attention.q_proj.out_features // heads
    if (
        output is None
        or output.in_features != attention.q_proj.out_features
        or width * heads != output.in_features
    ):
        raise _unsupported(lm, f"{name} has no output projection of the queries' width")
    return _Site(attention.q_proj, output, attention.q_proj.in_features, heads, groups, width)


def _unsupported(lm: PreTrainedModel, why: str) -> UserError:
    return UserError(
        f"{type(lm).__name__} does not support prefixes: {why}",
        where="adapter.kind: prefix",
        remedy="Use kind lora, series or parallel.",
    )
