"""The common part of the kinds from peft: how its layers are injected, activated, removed and saved.

Letters: N tokens, I inputs and O outputs of a layer.
"""

import dataclasses
import json
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.functional import inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from perl.adapters.experts import targets_as_named
from perl.adapters.kind import CONFIG, AdaptedLayer, AdapterKind
from perl.adapters.targets import choose, has_transposed_weights, linear_layers
from perl.backbones import backbone_of
from perl.errors import UserError
from perl.private.peft import BaseTunerLayer, set_active

NOT_COMPARED = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "revision", "inference_mode", "runtime_config"),
    *("base_model_name_or_path", "fan_in_fan_out", "save_projection", "megatron_core"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "feedforward_modules"),
    *("init_lora_weights", "init_weights", "d_initial", "init_v_bound", "eva_config"),
}
"""Keys of peft's configurations that say where an adapter is, which also follows from the names of its tensors, or
how it was initialized; or that have no effect on what it computes."""


class PeftKind(AdapterKind):
    """A kind of adapter implemented by peft."""

    wrapper = "base_layer."
    layer_type: ClassVar[type[BaseTunerLayer]]
    """Class of the layers with which peft replaces the base's."""
    in_peft: ClassVar[Mapping[str, str]] = {}
    """Settings that determine what the weights compute, with their names in peft's configuration."""
    meaning: ClassVar[tuple[str, ...]] = ()
    """Further keys of peft's configuration that determine it."""

    def __init__(self, lm: PreTrainedModel, settings: Any) -> None:
        super().__init__(lm, settings)
        self._transposed = has_transposed_weights(lm)
        self.config = self.peft_config()
        self.adapted = frozenset(f"{name}.weight" for name in getattr(self.config, "target_modules", None) or ())
        self._layers: list[Any] = []

    @abstractmethod
    def peft_config(self) -> PeftConfig:
        """Return peft's configuration, with every target module named individually.

        Raises:
            UserError: the settings do not fit the model.
        """

    def linear_targets(self, targets: str | list[str], layers: str | list[int]) -> dict[str, tuple[int, int]]:
        """Return the linear layers that these settings select, with (inputs, outputs).

        Raises:
            UserError: the model has no such module or layer, or one belongs to experts.
        """
        wanted = choose(self.lm, targets, layers, self.section)
        if of_experts := sorted(wanted.keys() - set(linear_layers(self.lm))):
            raise UserError(
                f"{self} are for linear layers only, and {of_experts[0]} belongs to experts",
                where=f"{self.section}.targets",
                remedy="Name targets without the experts, such as attention, or use kind lora.",
            )
        return wanted

    def inject(self, role: str) -> None:
        """Inject with peft, which wraps each layer once and adds parameters for each role."""
        try:
            with warnings.catch_warnings(), targets_as_named():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # intended
                self._inject_layers(role)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{self} do not fit this model: {error}",
                where=f"{self.section}.targets",
                remedy="Name modules of this model that do, or use another kind.",
            ) from None
        self._layers = [module for module in self.lm.modules() if isinstance(module, self.layer_type)]

    def _inject_layers(self, role: str) -> None:
        inject_adapter_in_model(self.config, self.lm, adapter_name=role)

    def activate(self, role: str | None) -> None:
        """Activate without setting `requires_grad`."""
        for layer in self._layers:
            set_active(layer, [] if role is None else [role])

    def remove(self) -> None:
        """Restore every wrapped layer."""
        for name, layer in list(self.lm.named_modules()):
            above, _, own = name.rpartition(".")
            if isinstance(layer, self.layer_type) and own != "base_layer":  # experts' layers are nested
                setattr(self.lm.get_submodule(above), own, layer.get_base_layer())
        vars(self.lm).pop("peft_config", None)
        self._layers = []
        super().remove()

    def layers(self, role: str) -> Iterator[AdaptedLayer]:
        """Yield the linear layers."""
        for name, layer in self.named_layers():
            base = layer.get_base_layer()
            if isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D":
                added = partial(self.added, layer, role)
                yield AdaptedLayer(name, layer, base, layer.in_features, added, frozenset(layer.active_adapters))

    @torch.no_grad()
    def added(self, layer: Any, role: str, x_NI: Tensor) -> Tensor:
        """Return what a layer's adapter adds by definition: (N, O), fp32."""
        delta = self.delta(layer, role)
        return x_NI @ (delta if self._transposed else delta.T)

    def delta(self, layer: Any, role: str) -> Tensor:
        """Return what a role adds to a layer's weight: fp32, of the weight's shape."""
        product: Tensor = layer.get_delta_weight(role)
        return product.float()

    @torch.no_grad()
    def deltas(self, role: str) -> Iterator[tuple[str, Tensor]]:
        """Yield what a role adds to every weight."""
        for name, layer in self.named_layers():
            yield f"{name}.weight", self.delta(layer, role)

    def named_layers(self) -> Iterator[tuple[str, Any]]:
        """Yield peft's layers, with the names of the base's layers that they replace."""
        for name, layer in self.lm.named_modules():
            if isinstance(layer, self.layer_type):
                yield name, layer

    def write_config(self, folder: Path, base: str, heads: list[str] | None) -> None:
        """Write the configuration as peft does."""
        self.config_on_disk(base, heads).save_pretrained(str(folder))

    def config_on_disk(self, base: str, heads: list[str] | None) -> Any:
        """Return peft's configuration of an adapter of this base; arguments are those of `write_config`."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Specified to not save vera_A")  # its seed is in the file
            config: Any = dataclasses.replace(self.config, base_model_name_or_path=base, inference_mode=True)
        config.task_type = "SEQ_CLS" if heads else backbone_of(self.lm.config).task_type
        config.modules_to_save = heads
        return config

    def config_fits(self, folder: Path) -> bool:
        """Return whether the kind, and all settings that determine what its weights compute, are the same here."""
        saved = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        here = self.config.to_dict()
        return all(saved[key] == here[key] for key in ("peft_type", *self.in_peft.values(), *self.meaning))

    def unlike(self, config: Mapping[str, Any]) -> str:
        """Return the first key of peft's configuration that differs from here, with its value."""
        here = self.config.to_dict()
        skipped = (NOT_COMPARED - set(self.meaning)) | set(self.in_peft.values())
        for key, value in config.items():
            said = value or None  # versions of peft differ in their empty values
            if key not in skipped and not key.endswith("_dropout") and said != (here.get(key) or None):
                return f"{key}: {json.dumps(value)}"
        return ""

    def export(self, role: str, folder: Path, base: str, heads: list[str] | None) -> dict[str, Tensor]:
        """Write the format of a run folder, which peft loads."""
        self.write_config(folder, base, heads)
        return {**self.parameters(role)}


class SharingKind(PeftKind):
    """A kind from peft with fixed tensors, which its tuner makes for the first role and all roles share."""

    tuner_type: ClassVar[Any]
    _tuner: Any = None
    _first = ""

    def _inject_layers(self, role: str) -> None:
        if self._tuner is None:
            self._tuner, self._first = self.tuner_type(self.lm, self.config, role), role
        else:
            self._tuner.peft_config[role] = self.config
            self._tuner.inject_adapter(self.lm, role)

    def remove(self) -> None:
        """Restore every wrapped layer, and drop the fixed tensors."""
        super().remove()
        self._tuner = None
