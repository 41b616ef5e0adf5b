"""Preflight: checks before the first update that the parts fit together, each a value and its limit.

A fault between the stages raises no error: RL trains on noise for hours. A few completions reveal it.

Axis letters: B completions, T completion positions.
"""

import math
from collections.abc import Callable, Iterator, Sequence
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
"""Maximum number of completions that are read."""
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Allowed difference of mathematically equal scores, by the base's dtype."""
AS_READ = "sampled as read"
"""Name of the check that the sampler's log-probs are those of a forward pass."""
KL_LIMIT = 1e-3
"""Nats per completion, before the first update, when policy and reference have the same weights."""

EarlierStages = Callable[[Samples, bool], Iterator[Finding]]
"""Checks that the results of earlier stages are intact; the second argument is `again` of `Preflight.check`."""


@dataclass
class Preflight:
    """The checks of one run.

    Args:
        prompts: the prompts that are completed, at most `COMPLETIONS`.
        where: the run folder, for messages.
        earlier_stages: checks that only the stages can make.

    Attributes:
        apart: difference of sampler and forward pass before the first update, nats per token.
    """

    collector: Collector
    prompts: EncodedPrompts
    where: str
    earlier_stages: EarlierStages
    apart: float = field(default=0.0, init=False)

    def noise(self, samples: Samples) -> float:
        """Return how far two correct computations of these log-probs may differ, nats per token.

        Large adapters round in every layer, which the embeddings' rounding does not show.
        """
        return max(rounding_noise(self.collector, samples), self.apart)

    def resume_from(self, found: Sequence[Check]) -> None:
        """Restore what the checks before the first update, made by an earlier process, measured."""
        self.apart = next(check.figure for check in found if check.name == AS_READ)

    def check(self, again: bool = False) -> list[Check]:
        """Run the checks, with one console line each, and return the findings.

        Args:
            again: run after the first update, when the roles differ: checks that hold only before it are left
                out, and only failures are printed.

        Raises:
            PreflightError: a check failed; the message names the likely cause.
        """
        generator = torch.Generator(self.collector.roles.device).manual_seed(self.collector.seed)
        samples = self.collector.draw(Role.POLICY, self.prompts, generator)
        when = "after the first update" if again else "before the first update"
        return require(self._checks(samples, again), when, self.where, quiet=again)

    def _checks(self, samples: Samples, again: bool) -> Iterator[Finding]:
        """Yield the checks that this recipe allows, in the order of their dependencies."""
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
        if base.passed and not after.passed:  # sampling changed the base: the cause of all else
            yield after
        yield from under_perturbation
        if again:
            words = "share of the policy's first movement that the sampler's log-probs miss"
            policy = against_the_reference(collector, samples)
            yield from moves_alike("sampler moved as the policy", words, policy, noise)


def read_at_the_end(collector: Collector, prompts: EncodedPrompts, samples: Samples) -> Finding:
    """Check that the reward is read at each completion's last token, the end token of its own training.

    If a completion ended with another end token, the reward reads the token of its training instead
    (`with_written_end`).
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
            f"wrong chat template or end-of-turn token: completions here end with {sampled or 'nothing'}, those "
            f"on which the reward was trained end with {trained}."
        )
    else:
        found = (_read_elsewhere(collector, model, prompts, samples, ends[0]) for model in reward.models)
        elsewhere = max(found, default=0)
        cause = "padding is on the wrong side: the score is read at a padding token, or at a token before the end."
    words = f"completions of {len(completions)} whose reward is not read at their last token"
    return Finding("read at the end", words, elsewhere, 0.0, cause)


@torch.no_grad()
def _read_elsewhere(
    collector: Collector, model: RewardModel, prompts: EncodedPrompts, samples: Samples, ends: tuple[int, ...]
) -> int:
    """Return the number of completions whose score differs from the head's at their last token, each read alone.

    The expected score includes the head's terms, if it has any.
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
    """Check that the sampler's log-probs equal those of a forward pass over the completions.

    Args:
        noise: effect of rounding on a pass, nats per token.
    """

    def off(log_probs_BT: Tensor) -> float:
        return gap(log_probs_BT, samples.sampler_log_probs_BT, samples)

    figure = off(collector.log_probs(Role.POLICY, samples))
    limit = max(CLOSE_LOG_PROBS[collector.dtype], 2 * noise)
    cause = "" if figure <= limit else _why_not_as_read(collector, off, samples, figure / 2)
    words = "the sampler's log-probs against a forward pass over its completions, mean difference per token"
    return Finding(AS_READ, words, figure, limit, cause)


def _why_not_as_read(collector: Collector, off: Callable[[Tensor], float], samples: Samples, enough: float) -> str:
    """Return the cause, by what brings the forward pass within `enough` nats per token of the sampler."""
    temperature = collector.sampling.temperature
    fitted, _ = fitted_temperature(collector, samples)
    others = [temperature * 2 ** (power / 4) for power in range(-8, 9) if power]
    others.append(temperature * math.exp(max(-2.0, min(fitted, 2.0))))
    gaps = {other: off(collector.log_probs(Role.POLICY, samples, other)) for other in others}
    nearest = min(gaps, key=gaps.__getitem__)
    if gaps[nearest] < enough:
        return another_temperature(nearest, temperature)
    if off(_alone(collector, samples, temperature)) < enough:
        return "rows read alone agree, but not rows read together: wrong padding side or wrong positions."
    for role in sorted(collector.roles.roles - {Role.POLICY, Role.CRITIC}):
        if off(collector.log_probs(role, samples)) < enough:
            return f"the sampler computes as a wrong role: {role} instead of {Role.POLICY}. This is a bug."
    return "the sampler computes as another role, or its cache or positions are wrong. This is a bug."


def begins_as_the_reference(collector: Collector, samples: Samples) -> Finding:
    """Check the KL to the reference by the k3 estimate (0 only if they are equal), nats per completion."""
    roles = collector.roles
    policy_BT, reference_BT = (collector.log_probs(role, samples) for role in (Role.POLICY, roles.reference))
    kl_BT = kl_k3(policy_BT, reference_BT).masked_fill(~samples.completion_mask_BT, 0.0)
    policy, reference = roles.weights(Role.POLICY), roles.weights(roles.reference)
    if reference and all(torch.equal(policy[name], reference[name]) for name in policy):
        cause = "the weights are equal, but the passes differ: dropout is on, or the padding differs."
    else:
        cause = f"the policy did not start as a copy of {roles.reference}; it has another adapter."
    words = f"KL of the policy to its reference ({roles.reference}), nats per completion"
    return Finding("begins as the reference", words, float(kl_BT.sum(1).mean()), KL_LIMIT, cause)


@torch.no_grad()
def _alone(collector: Collector, samples: Samples, temperature: float) -> Tensor:
    """Return the policy's log-probs (B, T), computed one row at a time and without padding."""
    log_probs_BT = torch.zeros_like(samples.sampler_log_probs_BT)
    for row, (prompt, tokens) in enumerate(zip(samples.prompt_ids(), samples.completions(), strict=True)):
        ids_BL = torch.tensor([[*prompt, *tokens]], device=collector.roles.device)
        mask_BL, length = torch.ones_like(ids_BL).bool(), len(tokens)
        outputs = collector.roles(Role.POLICY, ids_BL, mask_BL, completion_length=length, temperature=temperature)
        log_probs_BT[row, :length] = outputs.log_probs_BT[0]
    return log_probs_BT
