"""A kind of adapters from outside the package: a learned factor on each output of some linear layers.

That is what (IA)³ learns (Liu et al. 2022, arXiv 2205.05638). A recipe names this file and the kind:

    plugins: [example_ia3.py]
    adapter: {kind: ia3, targets: [k_proj, v_proj]}
"""

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
        self.active, self.hooks = None, []

    @property
    def adapted(self):
        return frozenset(f"{name}.weight" for name in self.chosen)

    def inject(self, role):
        for layer in self.chosen.values():
            if not hasattr(layer, "ia3_factors"):
                layer.ia3_factors = nn.ParameterDict()
                self.hooks.append(layer.register_forward_hook(self.scale))
            layer.ia3_factors[role] = nn.Parameter(torch.ones(layer.out_features, device=layer.weight.device))

    def scale(self, layer, inputs, y):
        return y if self.active is None else y * layer.ia3_factors[self.active].to(y.dtype)

    def activate(self, role):
        self.active = role

    def remove(self):
        for layer, hook in zip(self.chosen.values(), self.hooks, strict=True):
            del layer.ia3_factors
            hook.remove()
        self.hooks = []

    def starting_value(self, name):  # lets an RL run measure how far the policy has moved
        return 1.0

    def deltas(self, role):  # for `export --merge`
        for name, layer in self.chosen.items():
            yield f"{name}.weight", (layer.ia3_factors[role][:, None] - 1) * layer.weight.float()


ADAPTERS["ia3"] = Ia3
