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
from perl.roles.score_term import ScoredRows, ScoreTerm

WIDTH = 64
"""Of the hidden layer."""


class Likelihood(ScoreTerm):
    """Adds a network of one hidden layer, of the mean and the least log-probability of an answer's tokens.

    Both are in nats per token, so that length alone does not change their scale; the tanh bounds what an unlikely
    token costs.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__(lm)
        self.hidden = nn.Linear(2, WIDTH, device=lm.device)
        self.out = nn.Linear(WIDTH, 1, device=lm.device)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, scores_B: Tensor, rows: ScoredRows) -> Tensor:
        assert rows.hidden_BLD is not None  # encoders are refused
        answers_BT = rows.answers_BL[:, 1:]  # a row's first token is predicted from nothing
        embedding, transform = rows.lm.get_output_embeddings(), logits_transform(rows.lm.config)
        log_probs_BT, _ = completion_log_probs(
            rows.hidden_BLD[:, :-1], embedding, rows.ids_BL[:, 1:], answers_BT, 1.0, transform
        )
        mean_B = log_probs_BT.sum(1) / answers_BT.sum(1).clamp(min=1)
        added_B1: Tensor = self.out(self.hidden(torch.stack([mean_B, log_probs_BT.amin(1)], 1)).tanh())
        return scores_B + added_B1[:, 0]
