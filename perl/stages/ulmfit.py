"""Full tuning as in ULMFiT (Howard and Ruder 2018, arXiv 1801.06146): its schedule and gradual unfreezing.

From the top, the layers are everything above the blocks (a head, the final norm), the blocks, and the embeddings.
An encoder-decoder's decoder is above its encoder.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.stages.training_run import TrainingRun

CUT_FRACTION = 0.1
RATIO = 32
"""The paper's values for all its tasks."""


def slanted_triangular(step: int, steps: int) -> float:
    """Return the share of the peak rate in a step, counted from 0 (equation 3).

        cut = floor(T · cut_frac)      p = t / cut up to the cut, then 1 - (t - cut) / (cut · (1 / cut_frac - 1))
        η_t / η_max = (1 + p · (ratio - 1)) / ratio

    If the floor removes much, the equation's p ends below 0; here it is clamped to 0.
    """
    cut = max(1, math.floor(steps * CUT_FRACTION))
    p = step / cut if step < cut else 1 - (step - cut) / (cut * (1 / CUT_FRACTION - 1))
    return (1 + max(0.0, p) * (RATIO - 1)) / RATIO


def layers_of(roles: Roles, role: Role) -> list[list[nn.Parameter]]:
    """Return a role's weights and head by layer, the topmost layer first."""
    with roles.role(role):
        lm = roles.model()
    blocks = [{id(weight) for weight in block.parameters()} for block in reversed(roles.backbone.blocks(lm))]
    embeddings = {id(part.weight) for part in lm.modules() if isinstance(part, nn.Embedding)}
    layers: list[list[nn.Parameter]] = [[] for _ in range(len(blocks) + 2)]
    for name, weight in roles.weights(role).items():
        inside = next((place for place, of_block in enumerate(blocks, 1) if id(weight) in of_block), None)
        below = id(weight) in embeddings or "embed" in name
        layers[inside if inside is not None else -1 if below else 0].append(weight)
    if role in roles.heads:
        layers[0] += roles.head_weights(role).values()
    return [layer for layer in layers if layer]


class GradualUnfreezing(TrainerCallback):
    """Unfreezes layers from the top: one in the first epoch, and one more in each later epoch.

    Args:
        layers: layers from `layers_of`.
    """

    def __init__(self, layers: Sequence[Sequence[nn.Parameter]], run: TrainingRun) -> None:
        self._layers, self._run = layers, run

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        epoch = state.global_step * self._run.epochs // self._run.steps
        for depth, layer in enumerate(self._layers):
            for weight in layer:
                weight.requires_grad_(depth <= epoch)
