"""Parallel adapters (He et al. 2022, arXiv 2110.04366): each computes beside a part of a block."""

from perl.adapters.bottleneck import Bottleneck


class Parallel(Bottleneck):
    """y + s · up · f(down · x), where a part is given x and gives y."""

    takes_output = False
