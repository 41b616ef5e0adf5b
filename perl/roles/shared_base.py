"""A single frozen base in memory, on which every role is an adapter.

lm ── frozen weights, shared
 ├── sft      adapter          (reference)
 ├── policy   adapter
 ├── reward   adapter + head
 └── critic   adapter + head, or the head alone
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from perl.adapters import AdapterKind
from perl.adapters.coverage import Coverage, coverage
from perl.backbones.base import weights_sha256
from perl.parallel.engine import Engine
from perl.roles.fingerprint import changed, fingerprint
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.roles.split_layers import unsupported_reason


class SharedBase(Roles):
    """All roles on one base.

    Args:
        adapter: the kind of adapter that every role gets; its model gets frozen.
        engine: how the processes hold the base; if it shards the blocks, all blocks are computed for every role.

    Raises:
        UserError: the engine does not support these adapters.
    """

    prefix = "base_model.model."
    folder = "adapter"
    weights_file = "adapter_model.safetensors"
    split_unsupported_reason: str | None
    """Why the blocks below all adapters are computed separately for every role, if they are."""
    coverage: Coverage
    """The share of the base that has adapters."""

    def __init__(self, adapter: AdapterKind, engine: Engine | None = None) -> None:
        super().__init__(engine)
        self.adapter = adapter
        self.lm = adapter.lm.requires_grad_(False).eval()
        self.coverage = coverage(self.lm, adapter.adapted)
        adapter.use(self.engine)
        if self.engine.shards_base:
            self.engine.shard(self.lm, self.backbone.blocks(self.lm))
        self._adapted: set[Role] = set()
        lowest = adapter.lowest_layer
        spread = "they are sharded over the processes" if self.engine.shards_base else None
        self.split_unsupported_reason = (
            (spread or unsupported_reason(self.backbone, self.lm, lowest)) if lowest else None
        )
        self.shared_blocks = lowest if self.split_unsupported_reason is None else 0
        self._as_loaded = fingerprint(self._base_tensors())

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({Role.BASE, *self._adapted, *(Role(name) for name in self.heads)})

    def model(self) -> PreTrainedModel:
        return self.lm

    def models(self) -> list[PreTrainedModel]:
        return [self.lm]

    def weights(self, role: Role) -> dict[str, nn.Parameter]:
        return self.adapter.parameters(role)

    def by_learning_rate(self, *roles: Role) -> dict[float, list[nn.Parameter]]:
        found: dict[float, list[nn.Parameter]] = {1.0: []}
        for name, weight in (pair for role in roles for pair in self.weights(role).items()):
            found.setdefault(self.adapter.learning_rate_ratio(name), []).append(weight)
        return found

    def keep(self, *roles: Role) -> None:
        """Do nothing: adapters are small and all roles need the base."""

    def base_sha256(self) -> str:
        return weights_sha256(self.lm, self.engine.full_tensor, self.adapter.base_name)

    def base_changed(self) -> list[str]:
        """Return the names of the base's tensors that have changed since loading, judged by a sample of each."""
        return changed(self._as_loaded, self._base_tensors())

    def _base_tensors(self) -> dict[str, Tensor]:
        """Return the base's parameters, by their names before adapters were injected."""
        named = ((self.adapter.base_name(name), parameter) for name, parameter in self.lm.named_parameters())
        return {name: parameter for name, parameter in named if name is not None}

    @property
    def head_modules(self) -> list[str] | None:
        """The modules of a head, by their names in transformers' classifier; None if there are none."""
        return [name.rpartition(".")[2] for name in self.backbone.head_modules(self.lm)] or None

    def write_config(self, folder: Path, base: str, *, scores: bool) -> None:
        self.adapter.write_config(folder, base, self.head_modules if scores else None)

    def config_fits(self, folder: Path) -> bool:
        return self.adapter.config_fits(folder)

    def train(self, mode: bool = True) -> "SharedBase":
        super().train(mode)
        self.adapter.train(mode)
        return self

    @contextlib.contextmanager
    def sampling(self, role: Role) -> Iterator[list[Tensor]]:
        """Do as in `Roles`, with the adapter prepared for many passes."""
        prepared = self.adapter.sampling(role) if role in self._adapted else contextlib.nullcontext()
        with prepared, super().sampling(role) as seen:  # packed weights cannot be read
            yield seen

    def clear(self) -> None:
        """Remove all roles; the base is as it was loaded."""
        self.adapter.remove()
        self._adapted.clear()
        self.heads.clear()
        self.score_terms.clear()
        self._active = Role.BASE

    def _add_weights(self, role: Role, copy_of: Role) -> None:
        self.adapter.inject(role)
        self._adapted.add(role)
        start = self.weights(copy_of)
        for name, parameter in self.weights(role).items():
            parameter.data = parameter.data.float()  # adapters are trained in fp32 on a base of any dtype
            if copy_of is not Role.BASE:
                parameter.data.copy_(start[name].data)
        self.lm.requires_grad_(False)
        self._activate(self._active)

    def _activate(self, role: Role) -> None:
        self.adapter.activate(role if role in self._adapted else None)
        self._active = role
