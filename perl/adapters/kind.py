"""What a kind of adapters is to all that uses one.

A kind says where its parameters are (`mark`), what it puts into the model (`inject`, `adapted`), whose parameters
take part (`activate`) and how the model is restored (`remove`). The rest has defaults. Letters: N tokens, I inputs
and O outputs of a layer.
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
    """A layer whose output is known without the adapter, and what the adapter is defined to add to it."""

    name: str
    layer: Callable[[Tensor], Tensor]
    """With the adapter, (..., I) to (..., O)."""
    base: Callable[[Tensor], Tensor]
    """Without it."""
    inputs: int
    """I."""
    added: Callable[[Tensor], Tensor]
    """Of x (N, I) in fp32, by the definition: (N, O) in fp32."""
    active: frozenset[str]
    """The roles whose adapters compute now."""


class AdapterKind(ABC):
    """Adapters of one kind and shape, for every role on one frozen model.

    All parameters are in modules inside the model. The name of one is `...MARK...`, with the role's name as one of
    the parts after the mark: `layers.0.q_proj.lora_A.policy.weight`. `requires_grad` is never the kind's business.

    Args:
        lm: the model that the adapters are for; it has none yet, and nothing is put in so far.
        settings: the recipe's, of `settings_type`.

    Raises:
        UserError: the settings do not fit the model.
    """

    settings_type: ClassVar[type[Section]] = AdapterSettings
    """What a recipe can say of this kind."""
    section: ClassVar[str] = "adapter"
    """The recipe's section that has the settings."""
    mark: ClassVar[str]
    """Is in the name of every parameter of an adapter, and of none of the base."""
    wrapper: ClassVar[str] = ""
    """What injecting puts into the names of the base's own tensors, such as `base_layer.`."""

    rate_factor: ClassVar[float] = 1.0
    """Of learning rates that are `auto`: how many times LoRA's suits this kind."""
    rescales: ClassVar[bool] = False
    """Whether it rescales whole rows or columns of weights: what it adds to them then has no low rank."""

    adapted: frozenset[str]
    """The base's weights that have an adapter beside them, by their names before injection."""
    active: str | None = None
    """The role whose parameters take part in forward passes."""

    def __init__(self, lm: PreTrainedModel, settings: Any) -> None:
        self.lm, self.settings = lm, settings
        self.removal = contextlib.ExitStack()
        """Called back when the adapters are removed: what injecting has to have undone."""

    @property
    def shape(self) -> list[str]:
        """The settings that decide what the weights mean."""
        return list(type(self.settings).model_fields)

    def __str__(self) -> str:
        return f"adapters of kind {self.settings.kind}"

    @abstractmethod
    def inject(self, role: str) -> None:
        """Put a role's parameters into the model; with them as they begin it computes as the base."""

    def activate(self, role: str | None) -> None:
        """Let this role's parameters alone take part in forward passes from now on; None: nobody's."""
        self.active = role

    def remove(self) -> None:
        """Take all adapters out of the model, which has the modules that it was loaded with again."""
        self.removal.close()

    # What the names tell.

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The parameters of a role, by their names without the role's."""
        found = {}
        for name, parameter in self.lm.named_parameters():
            before, _, after = name.partition(self.mark)
            parts = after.split(".")
            if role in parts:
                found[before + self.mark + ".".join(part for part in parts if part != role)] = parameter
        return found

    def base_name(self, name: str) -> str | None:
        """The name of a tensor before injection; None if it is an adapter's."""
        return None if self.mark in name else name.replace(self.wrapper, "")

    def module_of(self, name: str) -> str:
        """The module that a parameter of an adapter is beside."""
        return name.partition(f".{self.mark}")[0]

    @property
    def lowest_layer(self) -> int:
        """The lowest block that has an adapter: those below compute alike for all roles."""
        return min((index for name in self.adapted if (index := layer_index(name)) is not None), default=0)

    # How it computes.

    def use(self, engine: Engine) -> None:  # noqa: B027  most kinds go with every engine
        """Note, before anything is injected, how the processes hold the model.

        Raises:
            UserError: these adapters do not compute under this engine.
        """

    def train(self, mode: bool) -> None:  # noqa: B027  most kinds have none
        """Switch the adapters' own dropout."""

    def sampling(self, role: str) -> AbstractContextManager[Any]:
        """Inside, the role computes many times without gradients or dropout, and does not learn."""
        return contextlib.nullcontext()

    # What the checks of an RL run compare.

    def starting_value(self, name: str) -> float | None:
        """What all elements of a parameter are in a new adapter; None: they are drawn."""
        return None

    def learning_rate_ratio(self, name: str) -> float:
        """What the learning rate is multiplied by for a parameter."""
        return 1.0

    def layers(self, role: str) -> Iterator[AdaptedLayer]:
        """The layers whose adapters of this role can be tried one by one."""
        return iter(())

    def ranks_unchanged(self, now: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> int:
        """The ranks that have moved in no module; where `start` lacks a parameter it began as a new one."""
        return 0

    # On disk.

    def write_config(self, folder: Path, base: str, heads: list[str] | None) -> None:
        """Write what the weights alone do not say.

        Args:
            base: the name or folder of the model.
            heads: the modules of a head that is saved with the adapter.
        """
        write_json(folder / CONFIG, self.settings.model_dump(mode="json"))

    def config_fits(self, folder: Path) -> bool:
        """Whether weights written with this configuration compute here what they computed there."""
        saved = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return bool(saved == self.settings.model_dump(mode="json"))

    def unlike(self, config: Mapping[str, Any]) -> str:
        """What of a configuration makes its weights compute otherwise than here, beside the settings of a recipe.

        Args:
            config: of a folder with an adapter of this kind, written elsewhere.
        """
        return ""

    def name_here(self, name: str) -> str:
        """The name that a tensor has in a run folder, of the one that it has where it was written."""
        return name

    def fixed(self, role: str) -> Mapping[str, Tensor]:
        """What is never trained, and may be on disk all the same, by its name there without peft's prefix."""
        return {}

    def export(self, role: str, folder: Path, base: str, heads: list[str] | None) -> dict[str, Tensor]:
        """Write a configuration for peft; return the tensors to write beside it, without their prefix there.

        Raises:
            UserError: peft would not read them as what they are.
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
        """What a role adds to the base's weights: their names before injection, and fp32 tensors of their shapes.

        Raises:
            UserError: what it computes is no sum of weights.
        """
        raise UserError(
            f"{self} cannot be merged: what they compute is not a change of weights",
            where="--merge",
            remedy="Leave the adapters beside their base: use the run folder.",
        )
