"""Roles on bases without weights, for memory estimates: see `perl.backbones.fake`."""

import torch
from transformers import PreTrainedModel

from perl.adapters import AdapterKind
from perl.backbones.fake import fake_lm, fill_with_fakes, unknown_values
from perl.private.torch import Unconverted
from perl.roles.role import Role
from perl.roles.separate_models import SeparateModels
from perl.roles.shared_base import SharedBase


class FakeSharedBase(Unconverted, SharedBase):
    """Fake adapters on a fake base."""

    def __init__(self, adapter: AdapterKind) -> None:
        with unknown_values():
            super().__init__(adapter)

    def add(self, role: Role, copy_of: Role = Role.BASE, *, weights: bool = True, head: bool = False) -> None:
        with torch.device("meta"):  # peft cannot create adapters on fake tensors
            super().add(role, copy_of, weights=weights, head=head)
        fill_with_fakes(self)

    @property
    def device(self) -> torch.device:
        """The device of token ids."""
        return torch.device("cpu")


class FakeSeparateModels(Unconverted, SeparateModels):
    """Fake models, one per role."""

    def __init__(self, lm: PreTrainedModel) -> None:
        self._config, self._dtype = lm.config, lm.dtype
        with unknown_values():
            super().__init__(lm, lambda: lm)

    def add(self, role: Role, copy_of: Role = Role.BASE, *, weights: bool = True, head: bool = False) -> None:
        super().add(role, copy_of, weights=weights, head=head)
        fill_with_fakes(self)

    def _add_weights(self, role: Role, copy_of: Role) -> None:
        self._models[role] = fake_lm(self._config, self._dtype).requires_grad_(False).eval()
