"""LoRA with peft's modules, names and files: W x + s B A x for linear layers and experts.

peft's forward pass, and its handling of several adapters, are replaced where `perl.adapters.low_rank` and
`perl.adapters.experts` compute the same in less time. Variants of LoRA that they do not support keep peft's.
"""

import contextlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from perl.adapters import experts, low_rank
from perl.adapters.kind import AdaptedLayer, AdapterKind
from perl.adapters.peft_kind import PeftKind
from perl.adapters.targets import choose, linear_layers
from perl.backbones import backbone_of
from perl.errors import UserError
from perl.parallel.engine import Engine
from perl.private.peft import LoraLayer, ParamWrapper
from perl.recipe.adapter import LoraSettings, RsLoraSettings
from perl.recipe.section import Section


class Lora(PeftKind):
    """LoRA; a variant supported by peft is a subclass that sets it in `config`."""

    settings_type: ClassVar[type[Section]] = LoraSettings
    section = "lora"
    mark = "lora_"
    layer_type = LoraLayer
    in_peft: ClassVar[Mapping[str, str]] = {"rank": "r", "alpha": "lora_alpha"}
    meaning = ("use_rslora", "use_dora", "lora_bias")
    name = "LoRA"
    """Name of the variant in messages."""
    zeros_change_nothing = True
    """Whether an adapter of zeros leaves the base's output unchanged."""
    settings: LoraSettings
    config: LoraConfig

    def __init__(self, lm: PreTrainedModel, settings: LoraSettings) -> None:
        super().__init__(lm, settings)
        self.adapted |= frozenset(self.config.target_parameters or ())
        if self.config.init_lora_weights not in (True, "gaussian"):
            raise UserError(
                f"starting LoRA with {self.config.init_lora_weights!r} changes the base, which all roles share",
                where=self.section,
                remedy="Leave init_lora_weights at peft's default.",
            )
        self._own_forward = True

    @property
    def shape(self) -> list[str]:
        """All settings except dropout."""
        return ["rank", "alpha", "targets", "layers"]

    def __str__(self) -> str:
        return f"{self.name} of rank {self.settings.rank}, alpha {self.settings.alpha:g}"

    def peft_config(self) -> LoraConfig:
        """Return peft's configuration, with every target module named individually.

        Raises:
            UserError: the model has no such module or layer, or no matrix of at least this rank.
        """
        settings, lm = self.settings, self.lm
        wanted = choose(lm, settings.targets, settings.layers, self.section)
        _refuse_rank(settings.rank, wanted, self.section)
        linear = set(linear_layers(lm))
        of_experts = [name for name in wanted if name not in linear]
        if of_experts and settings.dropout:
            raise UserError(
                f"adapters on experts ({of_experts[0]} and others) have no dropout",
                where=f"{self.section}.dropout",
                remedy=f"Set it to 0, or name {self.section}.targets without the experts, such as attention.",
            )
        return LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=[name for name in wanted if name in linear],
            target_parameters=of_experts or None,
            fan_in_fan_out=self._transposed,
        )

    @property
    def scale(self) -> float:
        """The scale s of B A x."""
        config = self.config
        return float(config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r))

    def add_biases(self) -> None:
        """Give new roles a bias along with B, in layers that have a bias."""
        self.config.lora_bias = True

    def set_factors(
        self, role: str, factors: Mapping[str, tuple[Tensor, Tensor]], biases: Mapping[str, Tensor]
    ) -> None:
        """Overwrite a role's weights, by module: A (R, I), B (O, R) and biases (O,); 0 where none is given."""
        given = {f"{module}.lora_A.weight": a_RI for module, (a_RI, _) in factors.items()}
        given |= {f"{module}.lora_B.weight": b_OR for module, (_, b_OR) in factors.items()}
        given |= {f"{module}.lora_B.bias": bias_O for module, bias_O in biases.items()}
        for name, parameter in self.parameters(role).items():
            parameter.data.copy_(given.get(name, torch.zeros_like(parameter)))

    def _inject_layers(self, role: str) -> None:
        with warnings.catch_warnings():  # some layers have no bias
            warnings.filterwarnings("ignore", message="`lora_bias=True` was passed but")
            super()._inject_layers(role)

    def use(self, engine: Engine) -> None:
        """Refuse experts if the engine gathers layer by layer; keep peft's forward if it hooks layers."""
        if self.config.target_parameters and engine.hooks_layers:
            raise UserError(
                f"{engine.name} gathers weights layer by layer, which does not work for experts with adapters",
                where=f"{self.section}.targets",
                remedy=f"Launch with recipes/engines/fsdp2.yaml, or set {self.section}.targets: attention.",
            )
        self._own_forward = not engine.hooks_layers

    def inject(self, role: str) -> None:
        """Inject with peft, and replace its forward where a faster equivalent exists."""
        super().inject(role)
        for layer in self._layers if self._own_forward else ():
            if isinstance(layer, ParamWrapper):
                experts.compute_with_one_adapter(layer)
            elif low_rank.is_plain_lora(layer, role):
                low_rank.compute_with_one_adapter(layer)

    def train(self, mode: bool) -> None:
        """Switch the dropout on A's inputs on or off."""
        for layer in self._layers:
            layer.lora_dropout.train(mode)

    def sampling(self, role: str) -> AbstractContextManager[Any]:
        """Inside the context, use the current factors, cast once to the base's dtype."""
        layers = [layer for layer in self._layers if low_rank.has_own_forward(layer)]
        return low_rank.kept_factors(layers, role, self.lm.dtype) if layers else contextlib.nullcontext()

    def starting_value(self, name: str) -> float | None:
        """Return 0 for B; A is random."""
        return 0.0 if "lora_B" in name else None

    def learning_rate_ratio(self, name: str) -> float:
        """Return B's own ratio, as in LoRA+."""
        return self.settings.b_learning_rate_ratio if "lora_B" in name else 1.0

    def layers(self, role: str) -> Iterator[AdaptedLayer]:
        """Yield the linear layers with plain LoRA."""
        for adapted in super().layers(role):
            layer: Any = adapted.layer
            if role in layer.lora_A and role not in layer.lora_variant:
                yield adapted

    @torch.no_grad()
    def added(self, layer: Any, role: str, x_NI: Tensor) -> Tensor:
        """Return the product s B A x."""
        a_RI, b_OR = (factors[role].weight.float() for factors in (layer.lora_A, layer.lora_B))
        product: Tensor = x_NI @ a_RI.T @ b_OR.T
        return self.scale * product

    def rank_axis(self, name: str, parameter: Tensor) -> int | None:
        """Return that of the columns of B, except of experts."""
        return 1 if "lora_B" in name and parameter.dim() == 2 and parameter.shape[1] == self.config.r else None

    def export(self, role: str, folder: Path, base: str, heads: list[str] | None) -> dict[str, Tensor]:
        """Export for peft; a language model's adapter also gets the form that vLLM and TGI load.

        Raises:
            UserError: peft would apply it to other modules.
        """
        tensors: dict[str, Tensor] = {**self.parameters(role)}
        linear = {name: tensor for name, tensor in tensors.items() if not self._is_of_experts(name)}
        if not heads and self.zeros_change_nothing:
            linear |= self._zero_adapters(linear)
        config = self.config_on_disk(base, heads)
        config.target_modules = sorted({self.module_of(name) for name in linear})
        if not experts.is_read_as_named(config, self.lm):
            raise UserError(
                "peft would apply this adapter to other modules: it takes shared experts and dense blocks of "
                f"{type(self.lm).__name__} for experts in an older layout",
                where=self.lm.name_or_path,
                remedy="Export with --merge: the whole model.",
            )
        if config.lora_alpha == int(config.lora_alpha):
            config.lora_alpha = int(config.lora_alpha)  # the type that vLLM and TGI expect
        config.save_pretrained(str(folder))
        return tensors | linear

    def _is_of_experts(self, name: str) -> bool:
        """Return whether a parameter belongs to experts, which peft lists in `target_parameters` and TGI lacks."""
        return isinstance(self.lm.get_submodule(self.module_of(name)), ParamWrapper)

    def _zero_adapters(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return adapters of zeros, which change nothing, for the same modules of all other layers.

        TGI uses the adapters of a kind of module (such as q_proj) only if every layer has one; otherwise it
        silently serves the bare base (server/text_generation_server/adapters/lora.py, `prepare_weights`).
        """
        modules = dict(self.lm.named_modules())

        def shape(name: str) -> Any:
            return getattr(getattr(modules.get(self.module_of(name)), "weight", None), "shape", None)

        found = {}
        for name, tensor in tensors.items():
            for layer in range(backbone_of(self.lm.config).depth):
                other = re.sub(r"\.\d+\.", f".{layer}.", name, count=1)
                if other not in tensors and shape(other) == shape(name):
                    found[other] = torch.zeros_like(tensor)
        return found

    @torch.no_grad()
    def deltas(self, role: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the product s B A of every layer.

        Raises:
            UserError: a variant adds something else.
        """
        plain = (low_rank.is_plain_lora(one, role) for one in self._layers if not isinstance(one, ParamWrapper))
        if not all(plain):
            AdapterKind.deltas(self, role)
        for name, layer in self.named_layers():
            if isinstance(layer, ParamWrapper):
                weight = f"{name}.{layer.parameter_name}"
                yield weight.replace(self.wrapper, ""), experts.expert_delta(layer, role)
            else:
                yield f"{name}.weight", self.delta(layer, role)


def _refuse_rank(rank: int, wanted: dict[str, tuple[int, int]], section: str) -> None:
    """Refuse a rank above that of all target matrices: it would use memory without any effect."""
    highest = max(min(shape) for shape in wanted.values())
    if rank > highest:
        raise UserError(
            f"rank {rank} is above that of every matrix that gets an adapter: the highest is {highest}",
            where=f"{section}.rank",
            remedy=f"Give at most {highest}; 1 to 64 is common.",
        )


class RsLora(Lora):
    """LoRA with the scale alpha / sqrt(rank), so that high ranks learn as fast as low ones (arXiv 2312.03732).

    Everything else, including the fast path, is as in LoRA.
    """

    settings_type = RsLoraSettings
    section = "adapter"
    name = "rsLoRA"
    rate_factor = 0.4

    def peft_config(self) -> LoraConfig:
        """Return LoRA's configuration with this variant's scale."""
        config = super().peft_config()
        config.use_rslora = True
        return config
