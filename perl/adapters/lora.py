"""LoRA by peft: W x + s B A x for linear layers and experts, its modules and names, its files.

peft's own forward, and its handling of several adapters, are replaced where `perl.adapters.low_rank` and
`perl.adapters.experts` compute the same in less time. A variant of LoRA that they do not compute keeps peft's.
"""

import contextlib
import dataclasses
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.functional import inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from perl.adapters import experts, low_rank
from perl.adapters.kind import CONFIG, AdaptedLayer, AdapterKind
from perl.adapters.targets import choose, linear_layers
from perl.errors import UserError
from perl.parallel.engine import Engine
from perl.private.peft import LoraLayer, ParamWrapper
from perl.recipe.adapter import LoraSettings

FACTORS = ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias")
"""Of peft's configuration, what says how the weights compute."""


class Lora(AdapterKind):
    """LoRA; a variant that peft has is a subclass whose `config` says so."""

    settings_type = LoraSettings
    section = "lora"
    mark, wrapper = "lora_", "base_layer."
    settings: LoraSettings

    def __init__(self, lm: PreTrainedModel, settings: LoraSettings) -> None:
        super().__init__(lm, settings)
        self.config = self.peft_config()
        if self.config.init_lora_weights not in (True, "gaussian"):
            raise UserError(
                f"LoRA that starts by {self.config.init_lora_weights!r} changes the base, which all roles share",
                where="lora",
                remedy="Leave init_lora_weights as peft has it.",
            )
        self._own_forward = True
        self._layers: list[Any] = []

    @property
    def shape(self) -> list[str]:
        """All but dropout."""
        return ["rank", "alpha", "targets", "layers"]

    def __str__(self) -> str:
        return f"LoRA of rank {self.settings.rank}, alpha {self.settings.alpha:g}"

    def peft_config(self) -> LoraConfig:
        """The shape in peft's terms, with target modules named one by one.

        Raises:
            UserError: no such module or layer in the model, or a rank that none of its matrices has.
        """
        settings, lm = self.settings, self.lm
        wanted = choose(lm, settings.targets, settings.layers, "lora")
        _refuse_rank(settings.rank, wanted)
        linear = set(linear_layers(lm))
        of_experts = [name for name in wanted if name not in linear]
        if of_experts and settings.dropout:
            raise UserError(
                f"adapters on experts ({of_experts[0]} and others) have no dropout",
                where="lora.dropout",
                remedy="Set it to 0, or name lora.targets without the experts, such as attention.",
            )
        transposed = any(type(module).__name__ == "Conv1D" for module in lm.modules())  # as GPT-2 stores weights
        return LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=[name for name in wanted if name in linear],
            target_parameters=of_experts or None,
            fan_in_fan_out=transposed,
        )

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        config = self.config
        return float(config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r))

    @property
    def adapted(self) -> frozenset[str]:
        """The weights of linear layers, and experts' parameters."""
        modules, parameters = self.config.target_modules or (), self.config.target_parameters or ()
        return frozenset({*(f"{name}.weight" for name in modules), *parameters})

    def use(self, engine: Engine) -> None:
        """Refuse experts that are gathered layer by layer; leave peft's forward to layers that an engine hooks."""
        if self.config.target_parameters and engine.hooks_layers:
            raise UserError(
                f"{engine.name} gathers weights layer by layer, and experts with adapters are no such layer",
                where="lora.targets",
                remedy="Launch with recipes/engines/fsdp2.yaml, or set lora.targets: attention.",
            )
        self._own_forward = not engine.hooks_layers

    def inject(self, role: str) -> None:
        """By peft, which wraps each layer once and gives it factors for each role."""
        try:
            with warnings.catch_warnings(), experts.targets_as_named():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several is the point
                inject_adapter_in_model(self.config, self.lm, adapter_name=role)
        except ValueError as error:
            raise UserError(
                f"LoRA does not fit this model: {error}",
                where="lora.targets",
                remedy="Name modules of this model, or use all-linear.",
            ) from None
        self._layers = [module for module in self.lm.modules() if isinstance(module, LoraLayer)]
        for layer in self._layers if self._own_forward else ():
            if isinstance(layer, ParamWrapper):
                experts.compute_with_one_adapter(layer)
            elif low_rank.is_plain_lora(layer, role):
                low_rank.compute_with_one_adapter(layer)

    def activate(self, role: str | None) -> None:
        """As peft's `set_adapter`, which would write `requires_grad` too: this is what its forward reads."""
        for layer in self._layers:
            layer._active_adapter = [] if role is None else [role]

    def remove(self) -> None:
        """Put every wrapped layer back in its place."""
        for name, layer in list(self.lm.named_modules()):
            above, _, own = name.rpartition(".")
            if isinstance(layer, LoraLayer) and own != "base_layer":  # of experts there are layers inside layers
                setattr(self.lm.get_submodule(above), own, layer.get_base_layer())
        vars(self.lm).pop("peft_config", None)
        self._layers = []

    def train(self, mode: bool) -> None:
        """Switch the dropout on what A is given."""
        for layer in self._layers:
            layer.lora_dropout.train(mode)

    def sampling(self, role: str) -> AbstractContextManager[Any]:
        """Inside, the factors are those of now, cast to the base's dtype once."""
        layers = [layer for layer in self._layers if low_rank.has_own_forward(layer)]
        return low_rank.kept_factors(layers, role, self.lm.dtype) if layers else contextlib.nullcontext()

    def starting_value(self, name: str) -> float | None:
        """B begins at zero, A is drawn."""
        return 0.0 if "lora_B" in name else None

    def layers(self, role: str) -> Iterator[AdaptedLayer]:
        """Plain products with a plain LoRA."""
        for name, layer in self.lm.named_modules():
            base: Any = getattr(layer, "base_layer", None)
            if isinstance(layer, ParamWrapper) or not isinstance(layer, LoraLayer) or role not in layer.lora_A:
                continue
            if role in layer.lora_variant or not (isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D"):
                continue
            a_RI, b_OR = (factors[role].weight.detach().float() for factors in (layer.lora_A, layer.lora_B))

            def added(x_NI: Tensor, a_RI: Tensor = a_RI, b_OR: Tensor = b_OR) -> Tensor:
                return self.scale * (x_NI @ a_RI.T @ b_OR.T)

            yield AdaptedLayer(name, layer, base, a_RI.shape[1], added, frozenset(layer.active_adapters))

    def ranks_unchanged(self, now: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> int:
        """Ranks whose column is as it began in every B; experts are left out."""
        moved_R: Tensor | None = None
        for name, b_OR in now.items():
            if "lora_B" in name and b_OR.dim() == 2 and b_OR.shape[1] == self.config.r:
                here_R = ~(b_OR == start.get(name, torch.zeros_like(b_OR))).all(0)
                moved_R = here_R if moved_R is None else moved_R | here_R
        return 0 if moved_R is None else int((~moved_R).sum())

    def write_config(self, folder: Path, base: str, heads: list[str] | None) -> None:
        """As peft does."""
        self._config_on_disk(base, heads).save_pretrained(str(folder))

    def _config_on_disk(self, base: str, heads: list[str] | None) -> LoraConfig:
        config = dataclasses.replace(self.config, base_model_name_or_path=base, inference_mode=True)
        config.task_type = "SEQ_CLS" if heads else "CAUSAL_LM"
        config.modules_to_save = heads
        return config

    def config_fits(self, folder: Path) -> bool:
        """Whether rank, scale and variant are those here."""
        saved = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return all(saved[key] == getattr(self.config, key) for key in FACTORS)

    def export(self, role: str, folder: Path, base: str, heads: list[str] | None) -> dict[str, Tensor]:
        """For peft; that of a language model also in the form that vLLM and TGI load.

        Raises:
            UserError: peft would read it as an adapter of other modules.
        """
        tensors: dict[str, Tensor] = {**self.parameters(role)}
        linear = {name: tensor for name, tensor in tensors.items() if not self._is_of_experts(name)}
        if not heads:
            linear |= self._zeros_elsewhere(linear)
        config = self._config_on_disk(base, heads)
        config.target_modules = sorted({self.module_of(name) for name in linear})
        if not experts.is_read_as_named(config, self.lm):
            raise UserError(
                f"peft would put this adapter elsewhere: it takes shared experts and dense blocks of "
                f"{type(self.lm).__name__} for experts in an older layout",
                where=self.lm.name_or_path,
                remedy="Export with --merge: the whole model.",
            )
        if config.lora_alpha == int(config.lora_alpha):
            config.lora_alpha = int(config.lora_alpha)  # the type that vLLM and TGI give it
        config.save_pretrained(str(folder))
        return tensors | linear

    def _is_of_experts(self, name: str) -> bool:
        """Whether a parameter is of experts, which peft knows by `target_parameters`, and TGI does not."""
        return isinstance(self.lm.get_submodule(self.module_of(name)), ParamWrapper)

    def _zeros_elsewhere(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adapters of zeros for the same modules of all other layers: they change nothing.

        TGI takes the adapters of a kind of module (such as q_proj) only where every layer has one; else it serves
        the bare base without a word (server/text_generation_server/adapters/lora.py, `prepare_weights`).
        """
        modules = dict(self.lm.named_modules())

        def shape(name: str) -> Any:
            return getattr(getattr(modules.get(self.module_of(name)), "weight", None), "shape", None)

        found = {}
        for name, tensor in tensors.items():
            for layer in range(self.lm.config.get_text_config().num_hidden_layers):
                other = re.sub(r"\.\d+\.", f".{layer}.", name, count=1)
                if other not in tensors and shape(other) == shape(name):
                    found[other] = torch.zeros_like(tensor)
        return found

    @torch.no_grad()
    def deltas(self, role: str) -> Iterator[tuple[str, Tensor]]:
        """The product s B A of every layer.

        Raises:
            UserError: a variant adds something else.
        """
        plain = (low_rank.is_plain_lora(one, role) for one in self._layers if not isinstance(one, ParamWrapper))
        if not all(plain):
            super().deltas(role)
        for name, layer in self.lm.named_modules():
            if isinstance(layer, ParamWrapper):
                weight = f"{name}.{layer.parameter_name}"
                yield weight.replace(self.wrapper, ""), experts.expert_delta(layer, role)
            elif isinstance(layer, LoraLayer):
                yield f"{name}.weight", layer.get_delta_weight(role).float()


def _refuse_rank(rank: int, wanted: dict[str, tuple[int, int]]) -> None:
    """Refuse a rank above that of every matrix it is to change: it would cost memory and give nothing."""
    highest = max(min(shape) for shape in wanted.values())
    if rank > highest:
        raise UserError(
            f"no matrix that gets an adapter has a rank of {rank}: the largest has {highest}",
            where="lora.rank",
            remedy=f"Give at most {highest}; 1 to 64 is common.",
        )
