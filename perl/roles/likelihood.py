"""What an answer's likelihood adds to its score.

The state at the last token holds little of how likely each word before it was: to see that a word is wrong, a
model has to compare it with what it expected there, and a low-rank adapter seldom learns to. The language model at
hand computes it anyway. Likelihood and hidden states together judge generated text better than either alone (Ren
et al. 2023, arXiv 2209.15558).
"""

import torch
from torch import Tensor, nn

LIKELIHOOD = "likelihood"
"""What its weights are called on disk."""
WIDTH = 64
"""Of the hidden layer."""


class LikelihoodHead(nn.Module):
    """A network of one hidden layer, of the mean and the least log-probability of an answer's tokens.

    Both are in nats a token, so that length alone does not change their scale; the tanh bounds what an unlikely
    token costs. It adds 0 until it is trained.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, WIDTH, device=device)
        self.out = nn.Linear(WIDTH, 1, device=device)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, log_probs_BL: Tensor, answers_BL: Tensor) -> Tensor:
        """The part of each row's score (B), fp32.

        Args:
            log_probs_BL: of the answers' tokens, fp32; 0 elsewhere.
            answers_BL: True for the answers' tokens, bool.
        """
        mean_B = log_probs_BL.sum(1) / answers_BL.sum(1).clamp(min=1)
        added_B1: Tensor = self.out(self.hidden(torch.stack([mean_B, log_probs_BL.amin(1)], 1)).tanh())
        return added_B1[:, 0]
