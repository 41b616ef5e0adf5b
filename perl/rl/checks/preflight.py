"""Preflight: before the first update, do the parts fit together? Each check is a value and its limit.

A fault between the stages raises nothing: RL trains on noise for hours. A few completions show it.

Axis letters: B completions, T completion positions.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from perl.backbones.padding import at_the_end
from perl.results import Check
from perl.rl.checks.findings import CLOSE_LOG_PROBS, Finding, require
from perl.rl.checks.tracking import (
    against_the_reference,
    another_temperature,
    at_the_temperature,
    fitted_temperature,
    follows_the_policy,
    gap,
    moves_alike,
    rounding_noise,
)
from perl.rl.checks.wiring import adapters_as_configured, base_unchanged, dropout_off, roles_apart
from perl.rl.collector import Collector
from perl.rl.maths import kl_k3
from perl.rl.rewards.model import RewardModel, with_written_end
from perl.rl.rollout import EncodedPrompts
from perl.rl.samplers.base import Samples
from perl.roles.role import Role
from perl.roles.score_terms import ScoredRows

COMPLETIONS = 8
"""Completions that are read, at most."""
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""How far scores equal by arithmetic may lie apart, by the base's dtype."""
KL_LIMIT = 1e-3
"""Nats per completion, before the first update: policy and reference are the same numbers then."""

EarlierStages = Callable[[Samples, bool], Iterator[Finding]]
"""Whether earlier stages left what they trained; told whether this is checked again."""


@dataclass
class Preflight:
    """The checks of one run.

    Args:
        prompts: of which a few are completed; `COMPLETIONS` at most.
        where: the run folder, for messages.
        earlier_stages: what only the stages can check.

    Attributes:
        apart: by how much sampler and forward pass differed before the first update, nats per token.
    """

    collector: Collector
    prompts: EncodedPrompts
    where: str
    earlier_stages: EarlierStages
    apart: float = field(default=0.0, init=False)

    def noise(self, samples: Samples) -> float:
        """Nats per token by which two right computations of these log-probs may differ.

        Large adapters round in every layer, which the embeddings' rounding does not show.
        """
        return max(rounding_noise(self.collector, samples), self.apart)

    def check(self, again: bool = False) -> list[Check]:
        """Check before the first update, a line each on the console; return what was found.

        Args:
            again: after the first update, when the roles differ: what can only be so before it is left out, and
                only what fails is printed.

        Raises:
            PreflightError: a check failed; it names the cause that it looks like.
        """
        generator = torch.Generator(self.collector.roles.device).manual_seed(self.collector.seed)
        samples = self.collector.draw(Role.POLICY, self.prompts, generator)
        when = "after the first update" if again else "before the first update"
        return require(self._checks(samples, again), when, self.where, quiet=again)

    def _checks(self, samples: Samples, again: bool) -> Iterator[Finding]:
        """The checks that this recipe allows, in the order of what rests on what."""
        collector, roles = self.collector, self.collector.roles
        base = base_unchanged(roles)
        yield base
        yield from self.earlier_stages(samples, again)
        yield read_at_the_end(collector, self.prompts, samples)
        noise = self.noise(samples)
        as_read = sampled_as_read(collector, samples, noise)
        if not again:
            self.apart = as_read.figure
        yield as_read
        yield at_the_temperature(collector, samples)
        if not again:
            yield begins_as_the_reference(collector, samples)
        under_perturbation = [
            dropout_off(collector, samples, noise),
            *adapters_as_configured(roles),
            roles_apart(collector, samples),
            *follows_the_policy(collector, self.prompts, noise),
        ]
        after = base_unchanged(roles)
        if base.passed and not after.passed:  # by what was sampled just now: the cause of all else
            yield after
        yield from under_perturbation
        if again:
            words = "what the sampler's log-probs miss of the policy's first movement, as a share"
            policy = against_the_reference(collector, samples)
            yield from moves_alike("sampler moved as the policy", words, policy, noise)


def read_at_the_end(collector: Collector, prompts: EncodedPrompts, samples: Samples) -> Finding:
    """The reward is read at each completion's last token, of the kind that it was trained to be read at.

    Where a completion ended with another of the end tokens, that one stands there instead (`with_written_end`).
    """
    chat, reward, sampling = collector.chat, collector.reward, collector.sampling
    ends = [chat.ends(prompt.context) for prompt in prompts.prompts]
    completions = samples.completions()
    rows = zip(completions, ends, samples.ended_B.tolist(), strict=True)
    if any(
        sampling.end_ids != expected or (ended and tokens[-1] not in expected) for tokens, expected, ended in rows
    ):
        elsewhere = len(completions)
        sampled, trained = (
            " or ".join(map(repr, chat.tokenizer.convert_ids_to_tokens(list(ids))))
            for ids in (sampling.end_ids, ends[0])
        )
        cause = (
            f"a wrong chat template or end-of-turn token: completions here end with {sampled or 'nothing'}, those "
            f"that the reward was trained on end with {trained}."
        )
    else:
        found = (_read_elsewhere(collector, model, prompts, samples, ends[0]) for model in reward.models)
        elsewhere = max(found, default=0)
        cause = "padding on the wrong side: the score is read at a padding token, or at a token before the end."
    words = f"of {len(completions)} completions, those whose reward is not read at their last token"
    return Finding("read at the end", words, elsewhere, 0.0, cause)


@torch.no_grad()
def _read_elsewhere(
    collector: Collector, model: RewardModel, prompts: EncodedPrompts, samples: Samples, ends: tuple[int, ...]
) -> int:
    """Completions whose score is not the head's on their last token's hidden state, each read alone.

    With the terms of a head that has any.
    """
    roles, elsewhere = collector.roles, 0
    completions = with_written_end(samples, ends).completions()
    for prompt, tokens, scores_M in zip(prompts.ids, completions, model.scores(samples).T.tolist(), strict=True):
        ids_BL = torch.tensor([[*prompt, *tokens]], device=roles.device)
        read_BL = torch.ones_like(ids_BL).bool()
        for member, score in zip(model.members, scores_M, strict=True):
            with roles.role(member):
                hidden_BLD = roles.trunk(ids_BL, read_BL)
                expected_1 = roles.head(member)(hidden_BLD[0, -1].float())
                if member in roles.score_terms:
                    answers_BL = at_the_end([len(tokens)], read_BL)
                    read = ScoredRows(roles.model(), hidden_BLD, ids_BL, read_BL, answers_BL)
                    expected_1 = roles.score_terms[member](expected_1, read)
            if not abs(score - float(expected_1)) <= CLOSE[collector.dtype]:
                elsewhere += 1
                break
    return elsewhere


def sampled_as_read(collector: Collector, samples: Samples, noise: float) -> Finding:
    """The log-probs that the sampler drew with are those of a forward pass over the completions.

    Args:
        noise: nats per token that rounding makes of a pass.
    """

    def off(log_probs_BT: Tensor) -> float:
        return gap(log_probs_BT, samples.sampler_log_probs_BT, samples)

    figure = off(collector.log_probs(Role.POLICY, samples))
    limit = max(CLOSE_LOG_PROBS[collector.dtype], 2 * noise)
    cause = "" if figure <= limit else _why_not_as_read(collector, off, samples, figure / 2)
    words = "the sampler's log-probs against a forward pass over its completions, mean difference a token"
    return Finding("sampled as read", words, figure, limit, cause)


def _why_not_as_read(collector: Collector, off: Callable[[Tensor], float], samples: Samples, enough: float) -> str:
    """What brings the forward pass closer to the sampler: less than `enough` nats per token apart."""
    temperature = collector.sampling.temperature
    fitted, _ = fitted_temperature(collector, samples)
    others = [temperature * 2 ** (power / 4) for power in range(-8, 9) if power]
    others.append(temperature * math.exp(max(-2.0, min(fitted, 2.0))))
    gaps = {other: off(collector.log_probs(Role.POLICY, samples, other)) for other in others}
    nearest = min(gaps, key=gaps.__getitem__)
    if gaps[nearest] < enough:
        return another_temperature(nearest, temperature)
    if off(_alone(collector, samples, temperature)) < enough:
        return "rows read alone agree, rows read together do not: padding on the wrong side, or positions."
    for role in sorted(collector.roles.roles - {Role.POLICY, Role.CRITIC}):
        if off(collector.log_probs(role, samples)) < enough:
            return f"the sampler computes as a wrong role: {role} instead of {Role.POLICY}. This is a bug."
    return "the sampler computes as another role, or its cache or positions are off. This is a bug."


def begins_as_the_reference(collector: Collector, samples: Samples) -> Finding:
    """KL to the reference by the k3 estimate (0 only of equals, else positive), nats per completion."""
    roles = collector.roles
    policy_BT, reference_BT = (collector.log_probs(role, samples) for role in (Role.POLICY, roles.reference))
    kl_BT = kl_k3(policy_BT, reference_BT).masked_fill(~samples.completion_mask_BT, 0.0)
    policy, reference = roles.weights(Role.POLICY), roles.weights(roles.reference)
    if reference and all(torch.equal(policy[name], reference[name]) for name in policy):
        cause = "the weights are equal, so they are computed differently: dropout is on, or the padding differs."
    else:
        cause = f"the policy did not begin as a copy of {roles.reference}; its adapter is another's."
    words = f"KL of the policy to its reference ({roles.reference}), nats per completion"
    return Finding("begins as the reference", words, float(kl_BT.sum(1).mean()), KL_LIMIT, cause)


@torch.no_grad()
def _alone(collector: Collector, samples: Samples, temperature: float) -> Tensor:
    """The policy's log-probs (B, T), a row at a time and without padding."""
    log_probs_BT = torch.zeros_like(samples.sampler_log_probs_BT)
    for row, (prompt, tokens) in enumerate(zip(samples.prompt_ids(), samples.completions(), strict=True)):
        ids_BL = torch.tensor([[*prompt, *tokens]], device=collector.roles.device)
        mask_BL, length = torch.ones_like(ids_BL).bool(), len(tokens)
        outputs = collector.roles(Role.POLICY, ids_BL, mask_BL, completion_length=length, temperature=temperature)
        log_probs_BT[row, :length] = outputs.log_probs_BT[0]
    return log_probs_BT
