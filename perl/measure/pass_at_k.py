"""pass@k: the probability that of k completions of a prompt at least one is right."""

from collections.abc import Sequence
from math import comb


def pass_at_k(right: Sequence[bool], k: int) -> float:
    """The unbiased estimate 1 - C(n - c, k) / C(n, k) from n completions of a prompt, of which c are right.

    Equation 1 of Chen et al. 2021 (arXiv 2107.03374). k is at most n.
    """
    n, c = len(right), sum(right)
    return 1.0 - comb(n - c, k) / comb(n, k)


def measured_ks(n: int) -> list[int]:
    """The k that n completions of a prompt tell of: the powers of two up to n."""
    return [1 << power for power in range(n.bit_length())]
