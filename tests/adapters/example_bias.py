"""Adapters of one's own: a learned bias on each output of some linear layers, as in BitFit (arXiv 2106.10199)."""

import torch
from torch import nn

from perl.adapters import ADAPTERS, AdapterKind
from perl.adapters.targets import choose
from perl.recipe.adapter import AdapterSettings


class BiasSettings(AdapterSettings):
    targets: str | list[str] = "all-linear"


class Bias(AdapterKind):
    settings_type, mark = BiasSettings, "learned_bias"

    def __init__(self, lm, settings):
        super().__init__(lm, settings)
        self.chosen = {name: lm.get_submodule(name) for name in choose(lm, settings.targets, "all", "adapter")}
        self.adapted = frozenset(f"{name}.weight" for name in self.chosen)

    def inject(self, role):  # biases begin as 0: the role computes as the base does
        for layer in self.chosen.values():
            if not hasattr(layer, "learned_bias"):
                layer.learned_bias = nn.ParameterDict()
                self.removal.callback(delattr, layer, "learned_bias")
                self.removal.callback(layer.register_forward_hook(self.add).remove)
            layer.learned_bias[role] = nn.Parameter(torch.zeros(layer.out_features, device=layer.weight.device))

    def add(self, layer, inputs, y):
        return y if self.active is None else y + layer.learned_bias[self.active].to(y.dtype)


ADAPTERS["bias"] = Bias
