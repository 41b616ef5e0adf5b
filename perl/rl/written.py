"""Rewards of completions that are given as text, from any source.

Axis letters: B completions, T completion positions, L positions of prompt and completion.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from perl.backbones.padding import joined
from perl.data.records import Prompt, Speaker, Turn
from perl.rl.collector import Collector
from perl.rl.evaluate import EVAL_BATCH
from perl.rl.samplers.base import Samples


@dataclass(frozen=True)
class Written:
    """A completion as text, without its end token; `ended` says whether it had one."""

    prompt: Prompt
    text: str
    ended: bool


def rewards_of(collector: Collector, written: Sequence[Written]) -> list[float]:
    """Return the collector's reward of each text, tokenized like completions of its base."""
    rewards: list[float] = []
    for start in range(0, len(written), EVAL_BATCH):
        part = written[start : start + EVAL_BATCH]
        prompts, texts = [one.prompt for one in part], [one.text for one in part]
        rewards += collector.reward(prompts, _samples(collector, part), texts).total_B.tolist()
    return rewards


def _samples(collector: Collector, written: Sequence[Written]) -> Samples:
    """Return the texts as tokens; they were not sampled, so their log-probs are 0."""
    prompts, completions = [], []
    for one in written:
        speaker: Speaker = "text" if one.prompt.context[-1].speaker == "text" else "agent"
        ids = collector.chat.completion(one.prompt.context, Turn(speaker, one.text))
        prompts.append(collector.chat.context(one.prompt.context))
        completions.append(ids if one.ended or len(ids) == 1 else ids[:-1])
    device, pad_id = collector.roles.device, collector.sampling.pad_id
    ids_BL, mask_BL = joined(prompts, completions, pad_id, device)
    length = max(map(len, completions))
    return Samples(
        ids_BL=ids_BL,
        mask_BL=mask_BL,
        prompt_lengths=[len(ids) for ids in prompts],
        completion_lengths=[len(ids) for ids in completions],
        ended_B=torch.tensor([one.ended for one in written], device=device),
        sampler_log_probs_BT=torch.zeros(len(written), length, device=device),
    )
