"""The interface of a kind of adapter.

A kind defines how its parameters are named (`mark`), what is added to the model (`inject`, `adapted`), how a
role's parameters are activated (`activate`) and how the model is restored (`remove`). The rest has defaults.
Letters: N tokens, I inputs and O outputs of a layer.
"""

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from perl.adapters.targets import layer_index
from perl.errors import UserError
from perl.parallel.engine import Engine
from perl.recipe.adapter import AdapterSettings
from perl.recipe.section import Section
from perl.system.files import write_json

CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer that can be computed without its adapter, and what the adapter adds to its output by definition."""

    name: str
    layer: Callable[[Tensor], Tensor]
    """The layer with the adapter, (..., I) to (..., O)."""
    base: Callable[[Tensor], Tensor]
    """The layer without the adapter."""
    inputs: int
    """Number of inputs, I."""
    added: Callable[[Tensor], Tensor]
    """What the adapter adds for x (N, I) in fp32, by definition: (N, O) in fp32."""
    active: frozenset[str]
    """The roles whose adapters are active now."""


class AdapterKind(ABC):
    """Adapters of one kind and shape, for every role on one frozen model.

    All parameters are in modules inside the model. Their names have the form `...MARK...`, with the role's name as
    one of the parts after the mark: `layers.0.q_proj.lora_A.policy.weight`. A kind never sets `requires_grad`.

    Args:
        lm: the model that the adapters are for; it has none yet, and the constructor injects none.
        settings: from the recipe, of type `settings_type`.

    Raises:
        UserError: the settings do not fit the model.
    """

    settings_type: ClassVar[type[Section]] = AdapterSettings
    """The settings that a recipe can have for this kind."""
    section: ClassVar[str] = "adapter"
    """The recipe section with the settings."""
    mark: ClassVar[str]
    """Part of the name of every adapter parameter, and of no parameter of the base."""
    wrapper: ClassVar[str] = ""
    """What injection adds to the names of the base's own tensors, such as `base_layer.`."""

    rate_factor: ClassVar[float] = 1.0
    """Factor on LoRA's learning rate for learning rates that are `auto`; see `rate_factor_at`."""
    rescales: ClassVar[bool] = False
    """Whether it rescales whole rows or columns of weights, so that its change of the weights is not low-rank."""

    adapted: frozenset[str]
    """The base's weights that have an adapter, by their names before injection."""
    active: str | None = None
    """The role whose parameters are active in forward passes."""

    def __init__(self, lm: PreTrainedModel, settings: Any) -> None:
        self.lm, self.settings = lm, settings
        self.removal = contextlib.ExitStack()
        """Callbacks that undo the injection when the adapters are removed."""

    @classmethod
    def rate_factor_at(cls, settings: Any) -> float:
        """Return the factor for adapters with these settings."""
        return cls.rate_factor

    @property
    def shape(self) -> list[str]:
        """The settings that the meaning of the weights depends on."""
        return list(type(self.settings).model_fields)

    def __str__(self) -> str:
        return f"adapters of kind {self.settings.kind}"

    @abstractmethod
    def inject(self, role: str) -> None:
        """Add a role's parameters to the model; with their initial values it computes the same as the base."""

    def activate(self, role: str | None) -> None:
        """Make only this role's parameters active in forward passes from now on; None: no role's."""
        self.active = role

    def remove(self) -> None:
        """Remove all adapters and restore the modules that the model was loaded with."""
        self.removal.close()

    # What follows from the names.

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """Return the parameters of a role, by their names without the role's name."""
        found = {}
        for name, parameter in self.lm.named_parameters():
            before, _, after = name.partition(self.mark)
            parts = after.split(".")
            if role in parts:
                found[before + self.mark + ".".join(part for part in parts if part != role)] = parameter
        return found

    def base_name(self, name: str) -> str | None:
        """Return the name of a tensor before injection; None if it is an adapter's."""
        return None if self.mark in name else name.replace(self.wrapper, "")

    def module_of(self, name: str) -> str:
        """Return the name of the module that an adapter parameter belongs to."""
        return name.partition(f".{self.mark}")[0]

    @property
    def lowest_layer(self) -> int:
        """The lowest block that has an adapter; the output of those below is the same for all roles."""
        return min((index for name in self.adapted if (index := layer_index(name)) is not None), default=0)

    # Computation.

    def use(self, engine: Engine) -> None:  # noqa: B027  most kinds work with every engine
        """Take note, before injection, of how the processes hold the model.

        Raises:
            UserError: these adapters do not work under this engine.
        """

    def train(self, mode: bool) -> None:  # noqa: B027  most kinds have none
        """Switch the adapters' own dropout on or off."""

    def sampling(self, role: str) -> AbstractContextManager[Any]:
        """Prepare for many forward passes as the role, without gradients, dropout or training."""
        return contextlib.nullcontext()

    # For the checks in an RL run.

    def starting_value(self, name: str) -> float | None:
        """Return the initial value of all elements of a parameter; None if they are random."""
        return None

    def learning_rate_ratio(self, name: str) -> float:
        """Return the factor on the learning rate for a parameter."""
        return 1.0

    def layers(self, role: str) -> Iterator[AdaptedLayer]:
        """Yield the layers whose adapters of this role can be tested one by one."""
        return iter(())

    def rank_axis(self, name: str, parameter: Tensor) -> int | None:
        """Return the axis (0 or 1) of a factor, initially zero, along which each rank learns; None for others."""
        return None

    # Files.

    def write_config(self, folder: Path, base: str, heads: list[str] | None) -> None:
        """Write the configuration that is needed besides the weights.

        Args:
            base: name or folder of the model.
            heads: the modules of the head that is saved with the adapter.
        """
        write_json(folder / CONFIG, self.settings.model_dump(mode="json"))

    def config_fits(self, folder: Path) -> bool:
        """Return whether weights written with this configuration compute the same here."""
        saved = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return bool(saved == self.settings.model_dump(mode="json"))

    def unlike(self, config: Mapping[str, Any]) -> str:
        """Describe what in a configuration, besides recipe settings, makes its weights compute differently here.

        Args:
            config: of an adapter of this kind written by another program.
        """
        return ""

    def name_here(self, name: str) -> str:
        """Return the name in a run folder of a tensor with this name in another program's file."""
        return name

    def fixed(self, role: str) -> Mapping[str, Tensor]:
        """Return the tensors that are never trained but may be on disk, by names without peft's prefix."""
        return {}

    def export(self, role: str, folder: Path, base: str, heads: list[str] | None) -> dict[str, Tensor]:
        """Write a configuration for peft; return the tensors to write next to it, by names without peft's prefix.

        Raises:
            UserError: peft cannot read them correctly.
        """
        if type(self).deltas is not AdapterKind.deltas:
            raise UserError(
                f"peft does not read {self}", where="export", remedy="Export the whole model: --merge."
            )
        raise UserError(
            f"peft does not read {self}, and they cannot be merged",
            where="export",
            remedy="Use the run folder: perl-rlhf chat, perl-rlhf evaluate, perl.load_run.",
        )

    def deltas(self, role: str) -> Iterator[tuple[str, Tensor]]:
        """Yield what a role adds to the base's weights: names before injection, fp32 tensors of the same shapes.

        Raises:
            UserError: the adapter does not amount to a change of weights.
        """
        raise UserError(
            f"{self} cannot be merged: they do not amount to a change of weights",
            where="--merge",
            remedy="Keep adapters and base separate: use the run folder.",
        )
