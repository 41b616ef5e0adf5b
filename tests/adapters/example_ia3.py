"""Adapters of one's own: (IA)³, a learned factor on each output of some linear layers (arXiv 2205.05638)."""

import torch
from torch import nn

from perl.adapters import ADAPTERS, AdapterKind
from perl.adapters.targets import choose
from perl.recipe.adapter import AdapterSettings


class Ia3Settings(AdapterSettings):
    targets: str | list[str] = "all-linear"


class Ia3(AdapterKind):
    settings_type, mark = Ia3Settings, "ia3_factors"

    def __init__(self, lm, settings):
        super().__init__(lm, settings)
        self.chosen = {name: lm.get_submodule(name) for name in choose(lm, settings.targets, "all", "adapter")}
        self.adapted = frozenset(f"{name}.weight" for name in self.chosen)

    def inject(self, role):  # factors begin as 1: the role computes as the base does
        for layer in self.chosen.values():
            if not hasattr(layer, "ia3_factors"):
                layer.ia3_factors = nn.ParameterDict()
                self.removal.callback(delattr, layer, "ia3_factors")
                self.removal.callback(layer.register_forward_hook(self.scale).remove)
            layer.ia3_factors[role] = nn.Parameter(torch.ones(layer.out_features, device=layer.weight.device))

    def scale(self, layer, inputs, y):
        return y if self.active is None else y * layer.ia3_factors[self.active].to(y.dtype)

    def deltas(self, role):  # for `export --merge`
        for name, layer in self.chosen.items():
            yield f"{name}.weight", (layer.ia3_factors[role][:, None] - 1) * layer.weight.float()


ADAPTERS["ia3"] = Ia3
