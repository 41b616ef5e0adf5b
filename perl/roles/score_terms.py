"""Score terms: parts of a reward model's score beyond the hidden state at a completion's last token.

Letters: V vocabulary; a leading 2 stands for the context and the completion.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from perl.backbones.logits import logits_transform
from perl.roles.log_probs import completion_log_probs


@dataclass(frozen=True)
class ScoredRows:
    """A batch of completions with their contexts, after the scoring role's forward pass.

    Attributes:
        lm: the language model of that role.
        hidden_BLD: hidden states after the last norm; None for a model with its own kind of head.
        ids_BL: token ids, int64.
        mask_BL: True for real tokens, bool.
        answers_BL: True for the completions' tokens, bool.
    """

    lm: PreTrainedModel
    hidden_BLD: Tensor | None
    ids_BL: Tensor
    mask_BL: Tensor
    answers_BL: Tensor


class ScoreTerm(nn.Module, ABC):
    """A part of a reward model's head that neither peft nor transformers supports.

    Its parameters are trained with the head; its buffers are computed. Both are saved. It leaves scores unchanged
    until it is trained or fitted.

    Args:
        lm: the language model that reads the rows.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, scores_B: Tensor, rows: ScoredRows) -> Tensor:
        """Return the scores (B) with this term, fp32.

        Args:
            scores_B: the scores without it.
        """


WIDTH = 64
"""Width of the hidden layer of `Likelihood`."""


class Likelihood(ScoreTerm):
    """A network with one hidden layer on the mean and the minimum log-prob of a completion's tokens.

    The state at the last token contains little about how likely each earlier word was: to see that a word is
    wrong, a model must compare it with what it expected there, which a low-rank adapter seldom learns. The
    language model computes these likelihoods anyway. Likelihood and hidden states together judge generated text
    better than either alone (Ren et al. 2023, arXiv 2209.15558).

    Both inputs are in nats per token, so that length alone does not change their scale; the tanh bounds the effect
    of an unlikely token.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__(lm)
        self.hidden = nn.Linear(2, WIDTH, device=lm.device)
        self.out = nn.Linear(WIDTH, 1, device=lm.device)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, scores_B: Tensor, rows: ScoredRows) -> Tensor:
        assert rows.hidden_BLD is not None  # encoders are refused
        answers_BT = rows.answers_BL[:, 1:]  # nothing predicts a row's first token
        embedding, transform = rows.lm.get_output_embeddings(), logits_transform(rows.lm.config)
        log_probs_BT, _ = completion_log_probs(
            rows.hidden_BLD[:, :-1], embedding, rows.ids_BL[:, 1:], answers_BT, 1.0, transform
        )
        mean_B = log_probs_BT.sum(1) / answers_BT.sum(1).clamp(min=1)
        added_B1: Tensor = self.out(self.hidden(torch.stack([mean_B, log_probs_BT.amin(1)], 1)).tanh())
        return scores_B + added_B1[:, 0]


class TfidfBlend(ScoreTerm):
    """The blend `model · score + words · (TF-IDF's log-odds) + intercept`.

    The log-odds come from logistic regression on the TF-IDF of the tokens. On people's ratings of long dialogues,
    single words are often as informative as a small model, but in a different way: the two are right on different
    completions, so that their weighted sum ranks better than either (stacking, Wolpert 1992).

    It is not trained by gradients: `perl.stages.reward_tfidf` fits it after training.

    Attributes:
        idf_2V: inverse document frequencies of tokens in contexts and in completions.
        weights_2V: weights of the logistic regression, on TF-IDF of unit length.
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
        """Return the log-odds from the words alone (B), fp32."""
        sides = (rows.mask_BL & ~rows.answers_BL, rows.answers_BL)
        found = [
            self._side(rows.ids_BL, side_BL, idf_V, weights_V)
            for side_BL, idf_V, weights_V in zip(sides, self.idf_2V, self.weights_2V, strict=True)
        ]
        context_B, answer_B = found
        return context_B + answer_B

    @staticmethod
    def _side(ids_BL: Tensor, mask_BL: Tensor, idf_V: Tensor, weights_V: Tensor) -> Tensor:
        counted_BL = (mask_BL & (ids_BL >= 0)).to(idf_V.dtype)  # negative: a decoder's start
        counts_BV = idf_V.new_zeros(len(ids_BL), len(idf_V)).scatter_add_(1, ids_BL.clamp(min=0), counted_BL)
        tfidf_BV = counts_BV * idf_V
        norm_B = tfidf_BV.norm(dim=1).clamp(min=torch.finfo(idf_V.dtype).tiny)
        log_odds_B: Tensor = tfidf_BV @ weights_V / norm_B
        return log_odds_B


SCORE_TERMS: dict[str, type[ScoreTerm]] = {"likelihood": Likelihood, "tfidf": TfidfBlend}


class ScoreTerms(nn.ModuleDict):
    """The score terms of one reward model, applied one after another.

    Args:
        names: of the terms, in the order in which they are applied.
        lm: see `ScoreTerm`.
    """

    def __init__(self, names: Iterable[str], lm: PreTrainedModel) -> None:
        super().__init__({name: SCORE_TERMS[name](lm) for name in names})

    def forward(self, scores_B: Tensor, rows: ScoredRows) -> Tensor:
        """See `ScoreTerm.forward`."""
        for term in self.values():
            scores_B = term(scores_B, rows)
        return scores_B
