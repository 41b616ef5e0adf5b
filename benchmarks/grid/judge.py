"""Independent evaluation of a cell: base and policy in plain transformers and peft, on prompts that no recipe saw.

It uses none of the package's code, so it reveals errors in the sampler, the saved adapters and the evaluation.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.grid import prompts
from benchmarks.grid.facts import prompt_ids, written_answer
from benchmarks.grid.prompts import Kind
from benchmarks.grid.stories import complete

SAMPLES = 4
"""Completions per prompt."""
RESAMPLES = 2000
CHUNK = 64
"""Rows whose log-probs are computed at once."""

Score = Callable[[list[list[int]], list[list[int]], list[str]], list[float]]
"""Computes rewards from prompts as tokens, completions as tokens, and completions as text."""


class Told(NamedTuple):
    """Completions of one policy; the `SAMPLES` of a prompt are adjacent."""

    ids: list[list[int]]
    texts: list[str]
    rewards: list[float]


def judge(
    base: Path,
    adapter: Path,
    dtype: torch.dtype,
    kind: Kind,
    max_new_tokens: int,
    score: Score,
    gold: Callable[[list[str]], list[float]] | None = None,
) -> dict[str, Any]:
    """Compare base and policy on the judge's prompts, with a paired interval of the change.

    Args:
        base: folder of the base.
        adapter: folder of the policy's adapter.
        score: the raw reward, without the scale used in training.
        gold: the true reward of completions as text, where it is known.

    Returns:
        reward_before, reward_after, interval (95 %, of the change), kl (nats per completion, on the policy's own
        completions), and for both: tokens, ended (share with an end token), distinct (share of different texts),
        gold where it is known; rewards_before and rewards_after, the mean for each prompt.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    asked = [prompt for prompt in prompts.judged(kind) for _ in range(SAMPLES)]
    asked_ids = prompt_ids(tokenizer, asked, kind)
    before = _told(model, tokenizer, asked_ids, max_new_tokens, score)
    ends = model.generation_config.eos_token_id
    policy = PeftModel.from_pretrained(model, str(adapter))
    after = _told(policy, tokenizer, asked_ids, max_new_tokens, score)
    found: dict[str, Any] = {"kl": fmean(_log_ratios(policy, asked_ids, after.ids))}
    for when, told in (("before", before), ("after", after)):
        found |= {
            f"reward_{when}": fmean(told.rewards),
            f"tokens_{when}": fmean(map(len, told.ids)),
            f"ended_{when}": fmean(ids[-1] in (ends if isinstance(ends, list) else [ends]) for ids in told.ids),
            f"distinct_{when}": len(set(told.texts)) / len(told.texts),
            f"rewards_{when}": by_prompt(told.rewards),
        }
        if gold is not None:
            found[f"gold_{when}"] = fmean(gold(told.texts))
    changes = np.subtract(found["rewards_after"], found["rewards_before"])
    return found | {"interval": paired_interval(changes)}


def _told(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    asked_ids: list[list[int]],
    max_new_tokens: int,
    score: Score,
) -> Told:
    torch.manual_seed(2)
    ids = complete(model, tokenizer, asked_ids, max_new_tokens)
    texts = [tokenizer.decode(one, skip_special_tokens=True).strip() for one in ids]
    return Told(ids, texts, score(asked_ids, ids, texts))


def by_prompt(values: Sequence[float]) -> list[float]:
    """Return the mean over each prompt's completions."""
    means: list[float] = np.reshape(values, (-1, SAMPLES)).mean(1).tolist()
    return means


def paired_interval(changes: Any) -> list[float]:
    """Return the 95 % bootstrap interval of the mean, resampling prompts."""
    drawn = np.random.default_rng(0).integers(len(changes), size=(RESAMPLES, len(changes)))
    low, high = np.percentile(np.asarray(changes)[drawn].mean(1), (2.5, 97.5))
    return [float(low), float(high)]


@torch.no_grad()
def _log_ratios(policy: PeftModel, asked_ids: list[list[int]], ids: list[list[int]]) -> list[float]:
    """Return log π(completion) - log base(completion) for each completion, in nats."""
    ratios: list[float] = []
    for start in range(0, len(ids), CHUNK):
        some = slice(start, start + CHUNK)
        rows = list(zip(asked_ids[some], ids[some], strict=True))
        # Right padding needs no mask: attention is causal, and positions count from the first token.
        length = max(len(prompt) + len(completion) for prompt, completion in rows)
        ids_BL = torch.zeros(len(rows), length, dtype=torch.long)
        said_BL = torch.zeros(len(rows), length, dtype=torch.bool)
        for index, (prompt, completion) in enumerate(rows):
            ids_BL[index, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
            said_BL[index, len(prompt) : len(prompt) + len(completion)] = True
        policy_BL = _log_probs(policy, ids_BL)
        with policy.disable_adapter():
            base_BL = _log_probs(policy, ids_BL)
        ratios += ((policy_BL - base_BL) * said_BL[:, 1:]).sum(1).tolist()
    return ratios


def _log_probs(model: PeftModel, ids_BL: Tensor) -> Tensor:
    """Return the log-prob of each token but the first, given the tokens before it."""
    log_probs_BLV = model(input_ids=ids_BL).logits[:, :-1].float().log_softmax(-1)
    log_probs_BL: Tensor = log_probs_BLV.gather(2, ids_BL[:, 1:, None])[:, :, 0]
    return log_probs_BL


def by_function(reward: Callable[..., list[float]], kind: Kind) -> Score:
    """Return a score that calls a reward function."""

    def score(asked_ids: list[list[int]], ids: list[list[int]], texts: list[str]) -> list[float]:
        return reward([written_answer(text, kind) for text in texts])

    return score


def by_model(base: Path, adapter: Path, dtype: torch.dtype) -> Score:
    """Return the score of a reward model trained on binary feedback: the probability of a thumb up."""
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=dtype)
    scorer = PeftModel.from_pretrained(classifier, str(adapter)).eval()

    @torch.no_grad()
    def score(asked_ids: list[list[int]], ids: list[list[int]], texts: list[str]) -> list[float]:
        # One row at a time: without padding the last token is unambiguous.
        rows = (torch.tensor([prompt + completion]) for prompt, completion in zip(asked_ids, ids, strict=True))
        return [float(scorer(input_ids=row).logits.float().sigmoid()) for row in rows]

    return score
