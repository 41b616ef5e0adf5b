"""How much of a base its adapters reach: of the matrices in its blocks, which are most of what it knows."""

from collections.abc import Set
from typing import NamedTuple

from transformers import PreTrainedModel

from perl.adapters.targets import layer_index
from perl.backbones.four_bit import weights_of

HALF = 0.5


class Coverage(NamedTuple):
    """Which of the blocks' matrices have an adapter beside them."""

    share: float
    """Of the weights of all matrices in the blocks, those in matrices with an adapter."""
    without: list[str]
    """Matrices that have an adapter in no block, by their names in a block."""

    def __str__(self) -> str:
        """One line for people."""
        percent = "all" if self.share == 1 else f"{100 * self.share:.3g} %"
        but = f"; none on {', '.join(self.without)}" if self.without else ""
        return f"The adapters cover {percent} of the blocks' matrix weights{but}."


def coverage(lm: PreTrainedModel, adapted: Set[str]) -> Coverage:
    """What adapters beside these weights reach; the base has none yet, and its weights are whole."""
    sizes = {
        name: weights_of(parameter)
        for name, parameter in lm.named_parameters()
        if layer_index(name) is not None and parameter.dim() > 1 and not name.endswith("bias")
    }
    kinds = {name: _in_a_block(name) for name in sizes}
    reached = {kinds[name] for name in sizes if name in adapted}
    without = sorted({kind for kind in kinds.values() if kind not in reached})
    share = sum(size for name, size in sizes.items() if name in adapted) / sum(sizes.values())
    return Coverage(share, without)


def _in_a_block(name: str) -> str:
    """A weight's name without the block's: `mlp.down_proj` of `model.layers.3.mlp.down_proj.weight`."""
    _, _, inner = name.partition(f".{layer_index(name)}.")
    return inner.removesuffix(".weight")
