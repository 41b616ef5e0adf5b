"""What a role computes.

Axis letters: B rows, T completion positions, D width.
"""

from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """What a role computes of a batch; None where it was not asked for."""

    log_probs_BT: Tensor | None = None
    """Log-probability of each completion token, fp32; 0 where there is no token."""
    entropy_BT: Tensor | None = None
    """Entropy of the distribution each completion token was drawn from, in nats, fp32; 0 where no token."""
    values_BT: Tensor | None = None
    """The head's value of the state before each completion token, fp32."""
    scores_B: Tensor | None = None
    """The head's score of the whole row, fp32."""
    states_BTD: Tensor | None = None
    """Hidden states that the completions' tokens are predicted from, in the base's dtype."""
