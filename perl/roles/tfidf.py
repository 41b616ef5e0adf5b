"""A score blended with what the words alone say: TF-IDF of the tokens with logistic regression.

On ratings of long dialogues by people, single words often tell as much as a small model does, and something else:
the two are right on different answers, so that their weighted sum ranks better than either (stacking, Wolpert
1992). Letters: V vocabulary; the leading 2 are the context and the answer.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from perl.roles.score_term import ScoredRows, ScoreTerm


class TfidfBlend(ScoreTerm):
    """Makes the score `model · score + words · (TF-IDF's log-odds) + intercept`.

    Nothing of it is trained by gradients: `perl.stages.reward_tfidf` fits it after training.

    Attributes:
        idf_2V: inverse document frequencies of tokens in contexts and in answers.
        weights_2V: of logistic regression, on TF-IDF of unit length.
        mix_3: model, words and intercept.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__(lm)
        embedding = lm.get_input_embeddings()
        self.register_buffer("idf_2V", torch.zeros(2, embedding.num_embeddings, device=lm.device))
        self.register_buffer("weights_2V", torch.zeros(2, embedding.num_embeddings, device=lm.device))
        self.register_buffer("mix_3", torch.tensor([1.0, 0.0, 0.0], device=lm.device))
        self.idf_2V: Tensor
        self.weights_2V: Tensor
        self.mix_3: Tensor

    def forward(self, scores_B: Tensor, rows: ScoredRows) -> Tensor:
        model, words, intercept = self.mix_3
        blended_B: Tensor = model * scores_B + words * self.log_odds(rows) + intercept
        return blended_B

    def log_odds(self, rows: ScoredRows) -> Tensor:
        """By the words alone (B), fp32."""
        sides = (rows.mask_BL & ~rows.answers_BL, rows.answers_BL)
        found = [
            self._side(rows.ids_BL, side_BL, idf_V, weights_V)
            for side_BL, idf_V, weights_V in zip(sides, self.idf_2V, self.weights_2V, strict=True)
        ]
        context_B, answer_B = found
        return context_B + answer_B

    @staticmethod
    def _side(ids_BL: Tensor, mask_BL: Tensor, idf_V: Tensor, weights_V: Tensor) -> Tensor:
        counted_BL = (mask_BL & (ids_BL >= 0)).to(idf_V.dtype)  # below: where a decoder starts
        counts_BV = idf_V.new_zeros(len(ids_BL), len(idf_V)).scatter_add_(1, ids_BL.clamp(min=0), counted_BL)
        tfidf_BV = counts_BV * idf_V
        norm_B = tfidf_BV.norm(dim=1).clamp(min=torch.finfo(idf_V.dtype).tiny)
        log_odds_B: Tensor = tfidf_BV @ weights_V / norm_B
        return log_odds_B
