"""Checks that the sampler computes the same as the policy, by effects that rounding cannot imitate.

In bfloat16 the log-probs of a sampler and of a forward pass differ by 0.01 to 0.06 nats per token on models where
nothing is wrong; at a temperature of 1.05 they differ by 0.03 to 0.08. The mean difference cannot distinguish the
two. But rounding is random, while another temperature or another adapter moves each token's log-prob in a known
direction; along that direction, a temperature difference of 0.2 % is visible.

Axis letters: B completions, T completion positions.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from perl.rl.checks.findings import Finding
from perl.rl.checks.perturbation import perturbed
from perl.rl.collector import Collector
from perl.rl.maths import masked_mean
from perl.rl.rollout import EncodedPrompts
from perl.rl.samplers.base import Samples
from perl.roles.role import Role

STEP = 1.05
"""Factor of the temperature with which its effect on each token is measured."""
TEMPERATURE = 0.02
"""Allowed relative error of the sampler's temperature, in addition to four standard errors."""
NATS = 0.5
"""Intended movement of a token under perturbation: far above rounding, but not so far that all becomes random."""
LARGEST = 1.0
"""Largest perturbation; a model that does not move under it has no large log-probs to move."""
TRIES = 4
FOLLOWS = 0.05
"""Share of the policy's movement that the sampler may miss, in addition to rounding."""
TOKENS = 32
"""Maximum length of a perturbed policy's completions."""


def gap(one_BT: Tensor, other_BT: Tensor, samples: Samples) -> float:
    """Return the mean absolute difference of two log-probs or values, per token."""
    return float(masked_mean((one_BT - other_BT).abs(), samples.completion_mask_BT))


def rounding_noise(collector: Collector, samples: Samples) -> float:
    """Return the effect of rounding on the policy's log-probs, nats per token, measured by the main process.

    Half of the embeddings' elements are moved by one unit in the last place, the difference of two equally correct
    computations; the result is how far the model amplifies it.
    """
    embeddings = {model.get_input_embeddings() for model in collector.roles.models()}
    generator = torch.Generator(collector.roles.device).manual_seed(0)

    def nudge(module: object, arguments: object, output_BLD: Tensor) -> Tensor:
        up = torch.rand(output_BLD.shape, generator=generator, device=output_BLD.device) < 0.5
        return torch.where(up, torch.nextafter(output_BLD, torch.full_like(output_BLD, math.inf)), output_BLD)

    samples = replace(samples, lower_hidden_BLD=None)  # else the embeddings are skipped
    plain_BT = collector.log_probs(Role.POLICY, samples)
    with contextlib.ExitStack() as stack:
        for embedding in embeddings:
            stack.enter_context(embedding.register_forward_hook(nudge))
        nudged_BT = collector.log_probs(Role.POLICY, samples)
    return collector.processes.broadcast(gap(plain_BT, nudged_BT, samples))


def fitted_temperature(collector: Collector, samples: Samples) -> tuple[float, float]:
    """Return the log of the ratio of the sampler's temperature to the recipe's, and its standard error.

    It is fitted by least squares along the temperature's effect on each token's log-prob.
    """
    mask_BT = samples.completion_mask_BT
    plain_BT = collector.log_probs(Role.POLICY, samples)
    warmer_BT = collector.log_probs(Role.POLICY, samples, collector.sampling.temperature * STEP)
    effect = ((warmer_BT - plain_BT) / math.log(STEP))[mask_BT].double()
    difference = (samples.sampler_log_probs_BT - plain_BT)[mask_BT].double()
    power = max(float(effect.square().sum()), 1e-12)  # 0 where all tokens are equally likely
    off = float((effect * difference).sum()) / power
    rest = float((difference - off * effect).square().mean().sqrt())
    return off, rest / math.sqrt(power)


def at_the_temperature(collector: Collector, samples: Samples) -> Finding:
    """Check that the sampler's temperature is the recipe's."""
    off, error = fitted_temperature(collector, samples)
    temperature = collector.sampling.temperature
    words = "relative error of the sampler's temperature, fitted to its log-probs"
    cause = another_temperature(temperature * math.exp(off), temperature)
    return Finding("temperature", words, abs(off), TEMPERATURE + 4 * error, cause)


def another_temperature(fitted: float, temperature: float) -> str:
    """Return the cause if the sampler's log-probs fit another temperature than the recipe's."""
    return (
        f"the sampler samples at another temperature, or its logits are scaled: the log-probs agree best at about "
        f"{fitted:.3g}, but rl.temperature is {temperature:g}."
    )


def follows_the_policy(collector: Collector, prompts: EncodedPrompts, noise: float) -> Iterator[Finding]:
    """Check that the sampler's log-probs under a perturbed policy are the perturbed policy's.

    There is no finding if no perturbation moves the policy far enough above rounding.

    Args:
        noise: effect of rounding on a pass, nats per token.
    """
    sampling = collector.sampling
    collector = replace(collector, sampling=replace(sampling, max_new_tokens=min(TOKENS, sampling.max_new_tokens)))
    target, size = max(NATS, 20 * noise), 0.1
    drawn = _draw_perturbed(collector, prompts, size)
    for _ in range(TRIES):
        if target / 2 <= drawn.moved <= 4 * target or (size == LARGEST and drawn.moved < target):
            break
        size = min(LARGEST, size * min(max(target / max(drawn.moved, 1e-9), 1 / 16), 16))
        drawn = _draw_perturbed(collector, prompts, size)
    words = "with the policy perturbed: share of its movement that the sampler's log-probs miss"
    yield from moves_alike("sampler follows the policy", words, drawn, noise)
    if drawn.values_BT is not None and drawn.samples.read_BT is not None:
        size = float(masked_mean(drawn.values_BT.abs(), drawn.samples.completion_mask_BT))
        missed = gap(drawn.samples.read_BT, drawn.values_BT, drawn.samples)
        cause = "the head is lost, or the sampler reads values from another role's hidden states. This is a bug."
        words = "with the critic perturbed: relative difference of values read in sampling and a forward pass"
        limit = 0.02 if collector.dtype == torch.float32 else 0.3
        yield Finding("values as read", words, missed / max(size, 1e-12), limit, cause)


class Moved(NamedTuple):
    """Completions, and the policy's log-probs from a forward pass before and after the policy moved."""

    samples: Samples
    before_BT: Tensor
    after_BT: Tensor
    moved: float
    """Nats per token, measured by the main process."""
    values_BT: Tensor | None = None
    """Values of the shared critic, after the move."""


def moves_alike(name: str, words: str, policy: Moved, noise: float) -> Iterator[Finding]:
    """Check that the sampler's log-probs are the moved policy's, if the movement is far enough above rounding."""
    samples, moved = policy.samples, policy.moved
    if moved <= 12 * noise or moved == 0:
        return
    missed = gap(samples.sampler_log_probs_BT, policy.after_BT, samples)
    mask_BT = samples.completion_mask_BT
    movement = (policy.after_BT - policy.before_BT)[mask_BT]
    followed = (samples.sampler_log_probs_BT - policy.before_BT)[mask_BT]
    slope = float((followed * movement).sum() / movement.square().sum())
    yield Finding(name, words, missed / moved, FOLLOWS + 3 * noise / moved, _diagnosis(slope))


def against_the_reference(collector: Collector, samples: Samples) -> Moved:
    """Return the policy's movement from its reference since the start of RL, on its own completions."""
    return _moved(
        collector,
        samples,
        *(collector.log_probs(role, samples) for role in (collector.roles.reference, Role.POLICY)),
    )


def _moved(
    collector: Collector, samples: Samples, before_BT: Tensor, after_BT: Tensor, values_BT: Tensor | None = None
) -> Moved:
    moved = collector.processes.broadcast(gap(before_BT, after_BT, samples))
    return Moved(samples, before_BT, after_BT, moved, values_BT)


def _draw_perturbed(collector: Collector, prompts: EncodedPrompts, size: float) -> Moved:
    roles, sampler = collector.roles, collector.sampler
    head = Role.CRITIC if Role.CRITIC in roles.heads and not roles.weights(Role.CRITIC) else None
    generator = torch.Generator(roles.device).manual_seed(collector.seed)
    with perturbed(roles.parameters_of(Role.POLICY, *([head] if head else [])), size):
        sampler.sync(Role.POLICY)
        samples = collector.draw(Role.POLICY, prompts, generator, head=head)
        after_BT, values_BT = collector.read(Role.POLICY, samples, collector.sampling.temperature, head)
    sampler.sync(Role.POLICY)
    assert after_BT is not None
    return _moved(collector, samples, collector.log_probs(Role.POLICY, samples), after_BT, values_BT)


def _diagnosis(slope: float) -> str:
    """Return the likely fault of a sampler that moves by this share of the policy's movement."""
    if abs(slope) < 0.2:
        cause = "the sampler is stale or computes as a wrong role: it does not see what the policy learns"
    elif slope > 1.3:
        cause = "the scale is doubled, or the adapter is both merged into the base and computed separately"
    elif slope < 0.9:
        cause = "the rank is truncated, the scale is too small, or the sampler is one step late"
    else:
        cause = "the sampler computes something other than the policy"
    return f"{cause}. This is a bug."
