"""One frozen base in memory, once; every role is a low-rank adapter on it.

    lm ── frozen weights, shared
     ├── sft      LoRA          (reference)
     ├── policy   LoRA
     ├── reward   LoRA + head
     └── critic   LoRA + head, or the head alone

peft's own `set_adapter` also switches `requires_grad`; here the two are kept apart, see `perl.roles.roles`.
"""

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

from peft import LoraConfig
from peft.functional import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from perl.adapters import experts, low_rank
from perl.adapters.coverage import Coverage, coverage
from perl.adapters.lora import lowest_adapted_layer, name_without_lora
from perl.backbones.base import weights_sha256
from perl.errors import UserError
from perl.parallel.engine import Engine
from perl.roles.fingerprint import changed, fingerprint
from perl.roles.roles import Role, Roles
from perl.roles.split_layers import unsupported_reason


class SharedBase(Roles):
    """All roles on one base.

    Args:
        lm: a causal language model, or an encoder's classifier; it is frozen, and LoRA layers are put into it.
        lora: the shape of every adapter.
        engine: how the processes that run together hold the base: an engine may spread its blocks over them, and
            then every block is computed for every role.

    Raises:
        UserError: the LoRA settings do not fit the model or the engine.
    """

    prefix = "base_model.model."
    folder = "adapter"
    weights_file = "adapter_model.safetensors"
    split_unsupported_reason: str | None
    """Why the blocks below every adapter are computed again for every role, where they are."""
    coverage: Coverage
    """How much of the base the adapters reach."""

    def __init__(self, lm: PreTrainedModel, lora: LoraConfig, engine: Engine | None = None) -> None:
        super().__init__(engine)
        self.lm = lm.requires_grad_(False).eval()
        self.coverage = coverage(lm, lora)
        if lora.target_parameters and self.engine.hooks_layers:
            raise UserError(
                f"{self.engine.name} gathers weights layer by layer, and experts with adapters are no such layer",
                where="lora.targets",
                remedy="Launch with recipes/engines/fsdp2.yaml, or set lora.targets: attention.",
            )
        if self.engine.shards_base:
            self.engine.shard(self.lm, self.backbone.blocks(self.lm))
        self.lora = lora
        self._layers: list[LoraLayer] = []
        lowest = lowest_adapted_layer(lora)
        spread = "they are spread over the processes" if self.engine.shards_base else None
        self.split_unsupported_reason = (
            (spread or unsupported_reason(self.backbone, lm, lowest)) if lowest else None
        )
        self._shared_blocks = lowest if self.split_unsupported_reason is None else 0
        self._as_loaded = fingerprint(self._base_tensors())

    @property
    def shared_blocks(self) -> int:
        """The blocks below every adapter, if what they compute can be kept."""
        return self._shared_blocks

    @property
    def roles(self) -> frozenset[Role]:
        """The roles that exist, `BASE` among them."""
        adapters = getattr(self.lm, "peft_config", {})
        return frozenset({Role.BASE, *(Role(name) for name in adapters), *(Role(name) for name in self.heads)})

    def model(self) -> PreTrainedModel:
        """The base, with the active role's adapter in it."""
        return self.lm

    def models(self) -> list[PreTrainedModel]:
        """The base."""
        return [self.lm]

    def weights(self, role: Role) -> dict[str, nn.Parameter]:
        """The LoRA parameters of a role, by their names without the role's."""
        mark = f".{role}."
        return {
            name.replace(mark, "."): parameter
            for name, parameter in self.lm.named_parameters()
            if "lora_" in name and mark in name
        }

    def keep(self, *roles: Role) -> None:
        """Nothing to free: adapters are small and the base is everybody's."""

    def base_sha256(self) -> str:
        """SHA-256 of the base's weights as they are now."""
        return weights_sha256(self.lm, self.engine.full_tensor)

    def base_changed(self) -> list[str]:
        """The base's tensors that are no longer as loaded, by a sample of each; nobody may change any."""
        return changed(self._as_loaded, self._base_tensors())

    def _base_tensors(self) -> dict[str, Tensor]:
        """The base's parameters, by the names that they had before adapters were put in."""
        return {
            name_without_lora(name): parameter
            for name, parameter in self.lm.named_parameters()
            if "lora_" not in name
        }

    def lora_layers(self, role: Role) -> dict[str, LoraLayer]:
        """The layers that have this role's adapter, by name."""
        return {
            name: module
            for name, module in self.lm.named_modules()
            if isinstance(module, LoraLayer) and role in module.lora_A
        }

    def write_config(self, folder: Path, base: str, *, scores: bool) -> None:
        """Write peft's configuration of an adapter."""
        config = dataclasses.replace(self.lora, base_model_name_or_path=base, inference_mode=True)
        config.task_type = "SEQ_CLS" if scores else "CAUSAL_LM"
        parts = self.backbone.head_modules(self.lm) if scores else []
        config.modules_to_save = [name.rpartition(".")[2] for name in parts] or None
        config.save_pretrained(folder)

    def config_fits(self, folder: Path) -> bool:
        """Whether rank and alpha are those here: the weights alone do not say by what they are multiplied."""
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return (config["r"], config["lora_alpha"]) == (self.lora.r, self.lora.lora_alpha)

    def train(self, mode: bool = True) -> "SharedBase":
        """Switch LoRA's dropout."""
        super().train(mode)
        for layer in self._layers:
            layer.lora_dropout.train(mode)
        return self

    @contextlib.contextmanager
    def sampling(self, role: Role) -> Iterator[list[Tensor]]:
        """As said there; the adapter's factors are cast to the base's dtype once."""
        adapted = role in getattr(self.lm, "peft_config", {}) and not self.training
        plain = [layer for layer in self._layers if not isinstance(layer, ParamWrapper)]
        layers = plain if adapted and not self.engine.hooks_layers else []
        with super().sampling(role) as seen, low_rank.kept_factors(layers, role, self.lm.dtype):
            yield seen

    def _add_weights(self, role: Role, copy_of: Role) -> None:
        try:
            with warnings.catch_warnings(), experts.targets_as_named():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several is the point
                inject_adapter_in_model(self.lora, self.lm, adapter_name=role)
        except ValueError as error:
            raise UserError(
                f"LoRA does not fit this model: {error}",
                where="lora.targets",
                remedy="Name modules of this model, or use all-linear.",
            ) from None
        self._layers = [module for module in self.lm.modules() if isinstance(module, LoraLayer)]
        for layer in self._layers if not self.engine.hooks_layers else ():
            if isinstance(layer, ParamWrapper):
                experts.compute_with_one_adapter(layer)
            else:
                low_rank.compute_with_one_adapter(layer)
        start = self.weights(copy_of)
        for name, parameter in self.weights(role).items():
            parameter.data = parameter.data.float()  # adapters learn in fp32 on a base of any dtype
            if copy_of is not Role.BASE:
                parameter.data.copy_(start[name].data)
        self.lm.requires_grad_(False)
        self._activate(self._active)

    def _activate(self, role: Role) -> None:
        # peft's set_adapter would also write every requires_grad; this attribute is all that its forward reads.
        adapters = getattr(self.lm, "peft_config", {})
        active = [str(role)] if role in adapters else []
        for layer in self._layers:
            layer._active_adapter = active
        self._active = role
