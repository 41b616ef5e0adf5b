"""The score terms by their names, which are the keys of the recipe's section `reward` that ask for them."""

from collections.abc import Iterable

from torch import Tensor, nn
from transformers import PreTrainedModel

from perl.roles.likelihood import Likelihood
from perl.roles.score_term import ScoredRows, ScoreTerm
from perl.roles.tfidf import TfidfBlend

SCORE_TERMS: dict[str, type[ScoreTerm]] = {"likelihood": Likelihood, "tfidf": TfidfBlend}


class ScoreTerms(nn.ModuleDict):
    """Those of one reward model, applied one after another.

    Args:
        names: in the order in which they are applied.
        lm: see `ScoreTerm`.
    """

    def __init__(self, names: Iterable[str], lm: PreTrainedModel) -> None:
        super().__init__({name: SCORE_TERMS[name](lm) for name in names})

    def forward(self, scores_B: Tensor, rows: ScoredRows) -> Tensor:
        """See `ScoreTerm.forward`."""
        for term in self.values():
            scores_B = term(scores_B, rows)
        return scores_B
