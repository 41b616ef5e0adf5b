"""What can go wrong in training, as alarms: the metrics, what they mean, the usual causes and the remedy."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Alarm:
    """What has gone wrong, in metrics and in words."""

    name: str
    step: int
    """When it was certain, counted from 1."""
    since: int
    """When it began to show."""
    good_until: int
    """The updates after which the policy was still right."""
    value: float | None
    """None: not finite."""
    limit: float
    grave: bool
    """Whether it stops the run."""
    what: str
    causes: str
    remedy: str


class Words(NamedTuple):
    """An alarm's text: what it is, the usual causes, and the remedy."""

    what: str
    causes: str
    remedy: str


WORDS = {
    "kl": Words(
        "the policy is {value:.0f} nats per completion away from its reference; the limit is {limit:.0f}",
        "Usually the learning rate is too large, or the KL coefficient too small to hold the policy.",
        "Lower rl.learning_rate or raise rl.kl_coef; if completions are long and read well, raise rl.kl_limit.",
    ),
    "entropy": Words(
        "the entropy has collapsed to {value:.3f} nats per token, less than {limit:.3f}, a tenth of the "
        "start's; a completion has {length.now:.0f} tokens, {length.start:.0f} at the start",
        "The policy says the same whatever it is asked: the learning rate is too large, the KL coefficient too "
        "small, or one completion exploits the reward.",
        "Read the samples; lower rl.learning_rate or raise rl.kl_coef.",
    ),
    "length_limit": Words(
        "{value:.0%} of the completions end by themselves; at the start {start:.0%} did",
        "Completions run into the length limit: the reward pays for length, or nothing punishes a missing end.",
        "Raise rl.missing_end_penalty, or rl.max_new_tokens if the completions need the room; look at the reward.",
    ),
    "shrinking": Words(
        "completions have shrunk to {value:.0f} tokens, from {start:.0f} at the start",
        "The KL penalty is paid for each token, so to stop at once is the cheapest way to pay less of it: the "
        "learning rate or the KL coefficient is too large. KL falls meanwhile, as if all were well.",
        "Lower rl.learning_rate, rl.kl_coef, or both.",
    ),
    "shrinking_by_penalty": Words(
        "completions have shrunk to {value:.0f} tokens, from {start:.0f} at the start, while more of them end by "
        "themselves",
        "The penalty for a missing end outweighs the reward: to stop at once is the cheapest way not to pay it.",
        "Lower rl.missing_end_penalty (0 takes none), or raise rl.max_new_tokens so that completions end in time.",
    ),
    "entropy_rising": Words(
        "the entropy has risen to {value:.2f} nats per token, from {start:.2f} at the start; the reward has not "
        "risen",
        "The policy is becoming random: the learning rate is too large, or the reward is mostly noise.",
        "Read the samples; lower rl.learning_rate, or raise rl.prompts_per_step or rl.kl_coef.",
    ),
    "sampler_mismatch": Words(
        "the log-probs that the sampler draws with are {value:.2g} nats per token off the policy's; {start:.2g} "
        "at the start",
        "The sampler no longer computes as the policy does: its weights are stale, or rounding has grown with "
        "them.",
        "Set base.dtype: float32, or lower rl.learning_rate; if it stays, this is a bug.",
    ),
    "nothing_learned": Words(
        "nothing is learned: at this pace the policy will have moved by {value:.1g} nats per token at the end of "
        "the run, less than {limit:.1g}, although the rewards differ",
        "The learning rate is too small, or what is updated does not act.",
        "Set rl.learning_rate: {rate}.",
    ),
    "no_signal": Words(
        "the rewards have given no advantage for {value:.0f} steps: there is nothing to learn from",
        "The reward does not tell completions apart: it is constant, asks for what the policy never does, or is "
        "already earned by every completion; or the algorithm has no use for it, as maxrl has none for rewards "
        "of at most 0.",
        "Look at the reward and the samples; a reward that gives part of the credit, more rl.samples_per_prompt "
        "or a higher rl.temperature help.",
    ),
    "divergence": Words(
        "{check} fell from {start:.2f} to {value:.2f} while the reward in training rose",
        "The policy exploits mistakes of its reward, or has learned its training prompts by heart.",
        "Stop earlier (rl.steps), raise rl.kl_coef, or mend the reward: more ratings, of completions like these.",
    ),
    "not_finite": Words(
        "loss or gradient was not finite: the update was refused",
        "A reward of absurd size, a learning rate too large, or numbers beyond the base's dtype.",
        "Look at the rewards; lower rl.learning_rate; with base.dtype float16 use bfloat16 or float32.",
    ),
}
