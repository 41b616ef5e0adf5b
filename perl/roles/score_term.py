"""What a reward model's score depends on besides the hidden state at an answer's last token."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class ScoredRows:
    """A batch of answers with their contexts, as the role that scores has read it.

    Attributes:
        lm: as that role has it.
        hidden_BLD: hidden states after the last norm; None of a model whose head is its own.
        ids_BL: token ids, int64.
        mask_BL: True for real tokens, bool.
        answers_BL: True for the answers' tokens, bool.
    """

    lm: PreTrainedModel
    hidden_BLD: Tensor | None
    ids_BL: Tensor
    mask_BL: Tensor
    answers_BL: Tensor


class ScoreTerm(nn.Module, ABC):
    """A part of a reward model's head that neither peft nor transformers has.

    Its parameters are trained with the head; its buffers are computed. Both are saved. It changes no score until
    it is trained or fitted.

    Args:
        lm: the language model that rows are read by.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, scores_B: Tensor, rows: ScoredRows) -> Tensor:
        """The scores (B) with this term, fp32.

        Args:
            scores_B: without it.
        """
