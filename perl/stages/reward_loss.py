"""The reward model's losses, and its batches of pairs and rated answers.

Axis letters: B answers to score, P pairs, T rated answers, E examples (pairs, then rated answers), L positions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from perl.backbones.padding import at_the_end, left_pad

MOST_LOG_TEMPERATURE = 9.0
"""Log of the maximum temperature: scores are divided by at most 8,100."""


def pairs_losses(better_P: Tensor, worse_P: Tensor, margins_P: Tensor, targets_P: Tensor) -> Tensor:
    """Return the Bradley-Terry loss per pair: -[p log σ(z) + (1-p) log σ(-z)], where z = r_w - r_l - margin.

    Args:
        targets_P: p, the probability that the better answer is better; at 1 the loss is -log σ(z) (PERL, section
            3; Bradley and Terry 1952; margins: Llama 2, section 3.2.2).
    """
    return F.binary_cross_entropy_with_logits(better_P - worse_P - margins_P, targets_P, reduction="none")


def thumbs_losses(scores_T: Tensor, targets_T: Tensor, weights_T: Tensor) -> Tensor:
    """Return the weighted binary cross-entropy per row, with the score as log-odds.

    Args:
        targets_T: the probability of a thumb up: 1 or 0, or a value between for soft labels.
    """
    return weights_T * F.binary_cross_entropy_with_logits(scores_T, targets_T, reduction="none")


def batch_loss(scores_B: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean loss of a batch's examples; a pair counts as much as a rated answer."""
    margins_P, weights_T = batch["margins_P"], batch["weights_T"]
    better_P, worse_P, rated_T = torch.split(scores_B, [len(margins_P), len(margins_P), len(weights_T)])
    targets_P, targets_T = torch.split(batch["targets_E"], [len(margins_P), len(weights_T)])
    of_pairs = pairs_losses(better_P, worse_P, margins_P, targets_P)
    return torch.cat([of_pairs, thumbs_losses(rated_T, targets_T, weights_T)]).mean()


def loss_at_best_temperature(batches: Sequence[tuple[Tensor, Mapping[str, Tensor]]]) -> float:
    """Return the mean loss of all batches' examples, scores divided by the temperature that minimises it.

    Args:
        batches: scores (B) and batch, for each batch.
    """
    from scipy.optimize import minimize_scalar

    counts = [len(batch["targets_E"]) for _, batch in batches]

    def loss(log_temperature: float) -> float:
        of_batches = (
            float(batch_loss(scores_B * math.exp(-log_temperature), batch)) for scores_B, batch in batches
        )
        return sum(one * count for one, count in zip(of_batches, counts, strict=True)) / sum(counts)

    # The loss is convex in 1 / T, so it has one minimum.
    return float(minimize_scalar(loss, bounds=(-MOST_LOG_TEMPERATURE, MOST_LOG_TEMPERATURE), method="bounded").fun)


class Example(TypedDict):
    """A rated answer, or the better and the worse answer of a pair."""

    rows: list[list[int]]
    """Tokens of each answer with its context."""
    answers: list[int]
    """Number of tokens of each answer without its context."""
    numbers: list[int]
    """Index of each answer among all rows."""
    target: float
    """The probability of a thumb up, or that the better answer is better."""
    margin: float
    weight: float
    length: int
    """Length of the longer row in tokens."""


@dataclass(frozen=True)
class Collator:
    """Collates examples to a padded batch: the better answers of pairs, then the worse, then the rated answers."""

    pad_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        pairs = [example for example in examples if len(example["rows"]) == 2]
        rated = [example for example in examples if len(example["rows"]) == 1]

        def together(key: Literal["rows", "answers", "numbers"]) -> list[Any]:
            first, second = ([example[key][place] for example in pairs] for place in (0, 1))
            return [*first, *second, *(example[key][0] for example in rated)]

        ids_BL, mask_BL = left_pad(together("rows"), self.pad_id, torch.device("cpu"))
        return {
            "ids_BL": ids_BL,
            "mask_BL": mask_BL,
            "answers_BL": at_the_end(together("answers"), mask_BL),
            "numbers_B": torch.tensor(together("numbers")),
            "targets_E": torch.tensor([example["target"] for example in (*pairs, *rated)]),
            "margins_P": torch.tensor([example["margin"] for example in pairs]),
            "weights_T": torch.tensor([example["weight"] for example in rated]),
        }
