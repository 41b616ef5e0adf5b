"""The conventional setup, `tuning: full`: every role is a separate model, and all its weights are trained.

Weights, gradients and the optimizer's state have the base's dtype. This is full tuning with the least memory (fp32
copies of bf16 weights would take more), so that the comparison is not biased in favor of LoRA.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from perl.parallel.engine import Engine
from perl.roles.role import Role
from perl.roles.roles import Roles


class SeparateModels(Roles):
    """One model per role.

    Args:
        lm: the base's model.
        load: loads the model again, for roles that start from the base after its memory was freed.
    """

    prefix = ""
    folder = "model"
    weights_file = "model.safetensors"

    def __init__(
        self, lm: PreTrainedModel, load: Callable[[], PreTrainedModel], engine: Engine | None = None
    ) -> None:
        super().__init__(engine)
        self._models = nn.ModuleDict({Role.BASE: lm.requires_grad_(False).eval()})
        self._load = load

    @property
    def roles(self) -> frozenset[Role]:
        """The roles that have been added, and `BASE` until its memory is freed."""
        return frozenset(Role(name) for name in (*self._models, *self.heads))

    def model(self) -> PreTrainedModel:
        model = self._models[self._active]
        assert isinstance(model, PreTrainedModel)
        return model

    def models(self) -> list[PreTrainedModel]:
        return [model for model in self._models.values() if isinstance(model, PreTrainedModel)]

    def weights(self, role: Role) -> dict[str, nn.Parameter]:
        """Return all parameters of the role's model; if the role has a head, without a classifier's own head."""
        if role not in self._models:
            return {}
        own, scores = self._models[role], role in self.heads
        assert isinstance(own, PreTrainedModel)
        named = own.named_parameters()
        return {name: p for name, p in named if not (scores and self.backbone.in_head(own, name))}

    def keep(self, *roles: Role) -> None:
        for role in self.roles - frozenset(roles):
            for kept in (self._models, self.heads, self.score_terms):
                if role in kept:
                    del kept[role]
        if Role.BASE in roles and Role.BASE not in self._models:
            self._add_weights(Role.BASE, Role.BASE)

    def base_sha256(self) -> None:
        """Return None: there is no shared base."""

    def write_config(self, folder: Path, base: str, *, scores: bool) -> None:
        config = copy.deepcopy(self.model().config)
        if scores:
            config.architectures = [
                type(self.model()).__name__.replace("ForCausalLM", "ForSequenceClassification")
            ]
            config.num_labels = 1
        config.save_pretrained(folder)

    def config_fits(self, folder: Path) -> bool:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(config["model_type"] == self.models()[0].config.model_type)  # a head alone has no model

    def _add_weights(self, role: Role, copy_of: Role) -> None:
        if copy_of in self._models:
            self._models[role] = copy.deepcopy(self._models[copy_of])
        else:
            assert copy_of is Role.BASE, f"no {copy_of} to copy"
            self._models[role] = self._load().requires_grad_(False).eval()

    def _activate(self, role: Role) -> None:
        self._active = role
