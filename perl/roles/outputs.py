"""The outputs of a forward pass as a role.

Axis letters: B rows, T completion positions, D width.
"""

from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """A role's outputs for a batch; None if not requested."""

    log_probs_BT: Tensor | None = None
    """Log-prob of each completion token, fp32; 0 in the padding."""
    entropy_BT: Tensor | None = None
    """Entropy of the distribution of each completion token, in nats, fp32; 0 in the padding."""
    values_BT: Tensor | None = None
    """The head's value of the state before each completion token, fp32."""
    scores_B: Tensor | None = None
    """The head's score of the whole row, fp32."""
    states_BTD: Tensor | None = None
    """Hidden states that predict the completions' tokens, in the base's dtype."""
