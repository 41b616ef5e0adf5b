"""DoRA: LoRA on the directions of a weight's rows, with learned magnitudes m (arXiv 2402.09353).

y = m / n * (W x + s B A x) + bias, where n are the norms of the rows of W + s B A, without gradients. Training
uses peft's forward. During sampling n is cached: computing it costs more than a token's products.

Letters: N tokens, I inputs and O outputs of a layer, R rank.
"""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor

from perl.adapters.kind import AdaptedLayer
from perl.adapters.lora import Lora
from perl.adapters.low_rank import compute_as
from perl.adapters.peft_kind import PeftKind
from perl.errors import UserError
from perl.parallel.engine import Engine
from perl.recipe.adapter import DoraSettings


class Dora(Lora):
    """DoRA with peft's layers."""

    settings_type = DoraSettings
    section = "adapter"
    name = "DoRA"
    zeros_change_nothing = False
    rescales = True

    def peft_config(self) -> LoraConfig:
        """Return LoRA's configuration, with magnitudes.

        Raises:
            UserError: a target belongs to experts.
        """
        config = super().peft_config()
        if config.target_parameters:
            raise UserError(
                f"{self} is for linear layers only, and {config.target_parameters[0]} belongs to experts",
                where="adapter.targets",
                remedy="Name targets without the experts, such as attention, or use kind lora.",
            )
        config.use_dora = True
        return config

    def use(self, engine: Engine) -> None:
        """Refuse engines that shard the base: the norms of rows are computed in each pass."""
        if engine.shards_base:
            raise UserError(
                f"{engine.name} shards the base's weights, and DoRA needs the norms of whole rows",
                where="adapter.kind: dora",
                remedy="Launch with recipes/engines/ddp.yaml or zero2.yaml, or use kind lora.",
            )
        super().use(engine)

    @torch.no_grad()
    def inject(self, role: str) -> None:
        """Inject with peft; magnitudes are computed in fp32, so that a new role equals the base in any dtype."""
        super().inject(role)
        for layer in self._layers:
            compute_as(layer, _CachedNormsForward)
            magnitude = layer.lora_magnitude_vector[role]
            magnitude.weight.data = _norms(layer, role)

    def train(self, mode: bool) -> None:
        """Switch dropout, which peft's forward applies only if the layer itself is in training mode."""
        super().train(mode)
        for layer in self._layers:
            layer.training = mode

    def sampling(self, role: str) -> AbstractContextManager[Any]:
        """Use the current norms inside the context."""
        return _cached_norms(self._layers, role)

    def layers(self, role: str) -> Iterator[AdaptedLayer]:
        """Yield all layers: the definition covers each."""
        return PeftKind.layers(self, role)

    @torch.no_grad()
    def added(self, layer: Any, role: str, x_NI: Tensor) -> Tensor:
        """Compute it by definition, with the cached norms if there are any: W cannot be read during sampling."""
        base = layer.get_base_layer()
        y_NO: Tensor = base(x_NI.to(self.lm.dtype)).float()
        plain_NO = y_NO if base.bias is None else y_NO - base.bias.float()
        kept = layer.kept
        norms_O = _norms(layer, role) if kept is None else kept.norms_O
        factor_O: Tensor = layer.lora_magnitude_vector[role].weight.float() / norms_O
        return (factor_O - 1) * plain_NO + factor_O * super().added(layer, role, x_NI)

    def delta(self, layer: Any, role: str) -> Tensor:
        """Return m / n (W + s B A) - W."""
        weight: Tensor = layer.get_base_layer().weight.float()
        whole = weight + super().delta(layer, role)
        factor_O: Tensor = layer.lora_magnitude_vector[role].weight.float() / _norms(layer, role)
        return (factor_O if self._transposed else factor_O[:, None]) * whole - weight

    def name_here(self, name: str) -> str:
        """Rename magnitudes as peft does when saving."""
        return f"{name}.weight" if name.endswith("lora_magnitude_vector") else name

    def deltas(self, role: str) -> Iterator[tuple[str, Tensor]]:
        """Yield what it adds to every weight."""
        return PeftKind.deltas(self, role)


class _Kept(NamedTuple):
    """Cached norms of one adapter."""

    name: str
    norms_O: Tensor


def _norms(layer: Any, name: str) -> Tensor:
    """Return the norms of the rows of W + s B A (O,), fp32, computed with peft's functions as in its forward."""
    magnitude = layer.lora_magnitude_vector[name]
    factors = {"lora_A": layer.lora_A[name], "lora_B": layer.lora_B[name]}
    lora_OI = magnitude.get_lora_weight(**factors).detach().float()
    weight = layer.get_base_layer().weight.to(lora_OI)
    norms: Tensor = magnitude.get_weight_norm(weight, lora_OI, layer.scaling[name])
    return norms


class _CachedNormsForward:
    """peft's forward of a DoRA layer, with the option of cached norms."""

    kept: _Kept | None = None

    def forward(self: Any, x: Tensor) -> Tensor:
        kept, active = self.kept, self.active_adapters
        if kept is None or active != [kept.name] or torch.is_grad_enabled():
            return super().forward(x)  # type: ignore[misc,no-any-return]
        y: Tensor = self.base_layer(x)
        a, b, bias = self.lora_A[kept.name], self.lora_B[kept.name], self.base_layer.bias
        factor_O = self.lora_magnitude_vector[kept.name].weight / kept.norms_O
        added = factor_O * b(a(x.to(a.weight.dtype))) * self.scaling[kept.name]
        plain = y if bias is None else y - bias
        whole: Tensor = y + ((factor_O - 1) * plain + added)
        return whole.to(y.dtype)


@contextlib.contextmanager
def _cached_norms(layers: list[Any], name: str) -> Iterator[None]:
    """Cache this adapter's current norms inside the context, for many forwards without gradients."""
    with torch.no_grad():
        for layer in layers:
            layer.kept = _Kept(name, _norms(layer, name))
    try:
        yield
    finally:
        for layer in layers:
            layer.kept = None
