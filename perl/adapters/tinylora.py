"""TinyLoRA: a handful of weights per layer, which mix fixed random matrices (arXiv 2602.04118).

y = W x + B (Σ v_i P_i) A x: B A is the best low-rank approximation of W, P is drawn from a seed, and only v is
learned. Each layer is decomposed once, and all roles share the result. A singular vector's sign is arbitrary, so
it is fixed here on every platform: the element of largest magnitude in each row of A is positive.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from peft import TinyLoraConfig
from torch import Tensor

from perl.adapters.low_rank import compute_as
from perl.adapters.peft_kind import SharingKind
from perl.errors import UserError
from perl.parallel.engine import Engine
from perl.private.peft import SharedDecomposition, TinyLoraLayer, TinyLoraModel
from perl.recipe.adapter import TinyLoraSettings


class TinyLora(SharingKind):
    """TinyLoRA with peft's layers."""

    settings_type = TinyLoraSettings
    mark = "tinylora_v"
    layer_type = TinyLoraLayer
    in_peft: ClassVar[Mapping[str, str]] = {
        "rank": "r",
        "size": "u",
        "weight_tying": "weight_tying",
        "projection_seed": "projection_seed",
    }
    tuner_type = TinyLoraModel
    settings: TinyLoraSettings

    def peft_config(self) -> TinyLoraConfig:
        settings = self.settings
        return TinyLoraConfig(
            r=settings.rank,
            u=settings.size,
            weight_tying=settings.weight_tying,
            projection_seed=settings.projection_seed,
            target_modules=list(self.linear_targets(settings.targets, settings.layers)),
            fan_in_fan_out=self._transposed,
        )

    def use(self, engine: Engine) -> None:
        """Refuse engines that shard the base: each weight is decomposed as a whole."""
        if engine.shards_base:
            raise UserError(
                f"{engine.name} shards the base's weights, and TinyLoRA decomposes whole weights",
                where="adapter.kind: tinylora",
                remedy="Launch with recipes/engines/ddp.yaml or zero2.yaml, or use kind lora.",
            )

    def _inject_layers(self, role: str) -> None:
        super()._inject_layers(role)
        for _, layer in self.named_layers():
            if role == self._first:
                _set_signs(layer, role)
                compute_as(layer, SharedDecomposition)
            for fixed in (layer.tinylora_A, layer.tinylora_B, layer.tinylora_P):
                fixed[role] = fixed[self._first].float()

    def starting_value(self, name: str) -> float | None:
        """Return zero for all of v."""
        return 0.0

    def export(self, role: str, folder: Path, base: str, heads: list[str] | None) -> dict[str, Tensor]:
        """Export with the fixed tensors, so that peft uses these signs and draws nothing."""
        return super().export(role, folder, base, heads) | {**self.fixed(role)}

    def fixed(self, role: str) -> Mapping[str, Tensor]:
        """Return the singular vectors and the random matrices."""
        return {
            f"{name}.{own}": getattr(layer, own)[role].clone()
            for name, layer in self.named_layers()
            for own in ("tinylora_A", "tinylora_B", "tinylora_P")
        }


def _set_signs(layer: Any, name: str) -> None:
    """Make the element of largest magnitude in each row of A positive; B A stays the same."""
    a_RI, b_OR = layer.tinylora_A[name], layer.tinylora_B[name]
    signs_R1 = a_RI.gather(1, a_RI.abs().argmax(1, keepdim=True)).sign()
    layer.tinylora_A[name], layer.tinylora_B[name] = a_RI * signs_R1, b_OR * signs_R1.T
