"""Series adapters (Houlsby et al. 2019, arXiv 1902.00751): each transforms what a part of a block gives."""

from perl.adapters.bottleneck import Bottleneck


class Series(Bottleneck):
    """y + s · up · f(down · y), where y is what a part gives, before it is added to the residual stream."""

    takes_output = True
