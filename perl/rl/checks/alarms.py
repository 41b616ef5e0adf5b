"""Alarms for what can go wrong in training: the metrics, what they mean, the usual causes and the remedy."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Alarm:
    """A detected problem, in metrics and in words."""

    name: str
    step: int
    """The step at which the alarm was raised, counted from 1."""
    since: int
    """The step at which the problem began to show."""
    good_until: int
    """Number of updates after which the policy was still good."""
    value: float | None
    """None: not finite."""
    limit: float
    grave: bool
    """Whether it stops the run."""
    what: str
    causes: str
    remedy: str


class Words(NamedTuple):
    """An alarm's text: the problem, the usual causes, and the remedy."""

    what: str
    causes: str
    remedy: str


WORDS = {
    "kl": Words(
        "the policy is {value:.0f} nats per completion away from its reference; the limit is {limit:.0f}",
        "Usually the {step} is too large, or the KL term is too weak, or missing, to hold the policy.",
        "Lower rl.{step_key} or {hold}; if completions are long and read well, raise rl.kl_limit.",
    ),
    "entropy": Words(
        "the entropy has collapsed to {value:.3f} nats per token, less than {limit:.3f}, a tenth of its value at "
        "the start; completions have {length.now:.0f} tokens, {length.start:.0f} at the start",
        "The policy gives the same completion to every prompt: the {step} is too large, the KL term is too "
        "weak or missing, or one completion exploits the reward.",
        "Read the samples; lower rl.{step_key} or {hold}.",
    ),
    "length_limit": Words(
        "{value:.0%} of the completions end by themselves; at the start {start:.0%} did",
        "Completions reach the length limit: the reward favours length, or nothing penalises a missing end.",
        "Raise rl.missing_end_penalty, or rl.max_new_tokens if the completions need the room; look at the reward.",
    ),
    "shrinking": Words(
        "completions have shrunk to {value:.0f} tokens, from {start:.0f} at the start",
        "The KL penalty is paid per token, so stopping at once is the cheapest way to reduce it: the {step} "
        "or the KL coefficient is too large. Meanwhile KL falls, as if all were well.",
        "Lower rl.{step_key}, rl.kl_coef, or both.",
    ),
    "shrinking_without_kl": Words(
        "completions have shrunk to {value:.0f} tokens, from {start:.0f} at the start",
        "The {step} is too large, or the reward is highest for the shortest completions.",
        "Read the samples; lower rl.{step_key} or {hold}.",
    ),
    "shrinking_by_penalty": Words(
        "completions have shrunk to {value:.0f} tokens, from {start:.0f} at the start, while more of them end by "
        "themselves",
        "The penalty for a missing end outweighs the reward: stopping at once is the cheapest way to avoid it.",
        "Lower rl.missing_end_penalty (0 turns it off), or raise rl.max_new_tokens so that completions can end.",
    ),
    "entropy_rising": Words(
        "the entropy has risen to {value:.2f} nats per token, from {start:.2f} at the start; the reward has not "
        "risen",
        "The policy is becoming random: the {step} is too large, or the reward is mostly noise.",
        "Read the samples; lower rl.{step_key}, raise rl.prompts_per_step, or {hold}.",
    ),
    "sampler_mismatch": Words(
        "the sampler's log-probs differ from the policy's by {value:.2g} nats per token; by {start:.2g} at the "
        "start",
        "The sampler no longer computes the same as the policy: its weights are stale, or rounding errors have "
        "grown with them.",
        "Set base.dtype: float32, or lower rl.{step_key}; if the mismatch remains, this is a bug.",
    ),
    "nothing_learned": Words(
        "nothing is learned: at this pace the policy will have moved by {value:.1g} nats per token by the end of "
        "the run, less than {limit:.1g}, although the rewards differ",
        "The {step} is too small, or the updated weights have no effect.",
        "Set rl.{step_key}: {better}.",
    ),
    "no_signal": Words(
        "the rewards have given no advantage for {value:.0f} steps: there is nothing to learn from",
        "The reward does not distinguish completions: it is constant, asks for what the policy never does, or is "
        "already earned by every completion; or the algorithm cannot use it, as maxrl cannot use rewards of at "
        "most 0.",
        "Look at the reward and the samples; a reward that gives partial credit, more rl.samples_per_prompt or a "
        "higher rl.temperature helps.",
    ),
    "divergence": Words(
        "{check} fell from {ends} while the reward in training rose",
        "The policy exploits errors of its reward, or has memorised its training prompts.",
        "Stop earlier (rl.steps), {hold}, or improve the reward with more ratings of such completions.",
    ),
    "not_finite": Words(
        "loss or gradient was not finite: the update was refused",
        "A reward is extremely large, the {step} is too large, or values exceed the base dtype's range.",
        "Look at the rewards; lower rl.{step_key}; instead of base.dtype float16 use bfloat16 or float32.",
    ),
}
