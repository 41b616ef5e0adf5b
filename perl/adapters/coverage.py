"""How much of a base its adapters cover: the share of the weights in its blocks' matrices."""

from collections.abc import Set
from typing import NamedTuple

from transformers import PreTrainedModel

from perl.adapters.targets import in_a_block, modules_in_blocks
from perl.backbones.four_bit import weights_of

HALF = 0.5


class Coverage(NamedTuple):
    """The blocks' matrices that have an adapter."""

    share: float
    """Share of the weights of all matrices in the blocks that are in matrices with an adapter."""
    without: list[str]
    """Matrices without an adapter in any block, by their names in a block."""

    def __str__(self) -> str:
        """Return a one-line summary."""
        percent = "all" if self.share == 1 else f"{100 * self.share:.3g} %"
        but = f"; none on {', '.join(self.without)}" if self.without else ""
        return f"The adapters cover {percent} of the blocks' matrix weights{but}."


def coverage(lm: PreTrainedModel, adapted: Set[str]) -> Coverage:
    """Return the coverage of adapters on these weights; the base has none yet, and its weights are not sharded."""
    sizes = {
        f"{name}.{own}": weights_of(parameter)
        for name, module in modules_in_blocks(lm).items()
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1 and not own.endswith("bias")
    }
    kinds = {name: in_a_block(name).removesuffix(".weight") for name in sizes}
    reached = {kinds[name] for name in sizes if name in adapted}
    without = sorted({kind for kind in kinds.values() if kind not in reached})
    share = sum(size for name, size in sizes.items() if name in adapted) / sum(sizes.values())
    return Coverage(share, without)
