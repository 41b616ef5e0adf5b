"""What an answer's likelihood adds to its score.

The state at the last token holds little of how likely each word before it was: to see that a word is wrong, a
model has to compare it with what it expected there, and a low-rank adapter seldom learns to. The language model at
hand computes it anyway. Likelihood and hidden states together judge generated text better than either alone (Ren
et al. 2023, arXiv 2209.15558).
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from perl.backbones.logits import logits_transform
from perl.roles.log_probs import completion_log_probs

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

    def forward(self, lm: PreTrainedModel, hidden_BLD: Tensor, ids_BL: Tensor, answers_BL: Tensor) -> Tensor:
        """What is added to each row's score (B), fp32.

        Args:
            lm: as the role that scores has it.
            hidden_BLD: its hidden states after the last norm.
            ids_BL: token ids, int64.
            answers_BL: True for the answers' tokens, bool.
        """
        answers_BT = answers_BL[:, 1:]  # a row's first token is predicted from nothing
        embedding, transform = lm.get_output_embeddings(), logits_transform(lm.config)
        log_probs_BT, _ = completion_log_probs(
            hidden_BLD[:, :-1], embedding, ids_BL[:, 1:], answers_BT, 1.0, transform
        )
        mean_B = log_probs_BT.sum(1) / answers_BT.sum(1).clamp(min=1)
        added_B1: Tensor = self.out(self.hidden(torch.stack([mean_B, log_probs_BT.amin(1)], 1)).tanh())
        return added_B1[:, 0]
