"""How far the policy has moved from its reference, measured below rounding.

A first update moves a token's log-prob by less than what bfloat16 rounds away. So what the policy's adapter has
learned is magnified until the log-probs move by far more, and what they moved by is divided by the magnification:
the log-probs are nearly linear in so small a change.

Axis letters: B completions, T positions in them.
"""

from torch import Tensor

from perl.rl.checks.perturbation import part_of, restored
from perl.rl.checks.tracking import gap
from perl.rl.collector import Collector
from perl.rl.samplers.base import Samples
from perl.roles.roles import Role
from perl.roles.shared_base import SharedBase

NATS = 0.1
"""A movement that needs no magnification; five times it is no longer linear."""
MOST = 1e6
"""By what a magnification grows in one go."""
TRIES = 10
FEWEST_STEPS = 10.0
"""A run that is shorter is not blamed for it: its policy is thought on to so many steps."""


def policy_movement(collector: Collector, samples: Samples) -> float:
    """Mean absolute difference of the policy's log-probs from the reference's, nats a token; the main process's.

    Of whole models, which are not magnified, it includes what rounding makes of a change.
    """
    roles = collector.roles
    reference_BT = collector.log_probs(roles.reference, samples)
    moved, factor = _moved(collector, samples, reference_BT), 1.0
    if not isinstance(roles, SharedBase):
        return moved
    for _ in range(TRIES):
        if NATS <= moved <= 5 * NATS or (factor == 1.0 and moved > NATS):
            break
        factor = max(1.0, factor * (min(2 * NATS / moved, MOST) if moved > 0 else MOST))
        moved = _magnified(collector, samples, reference_BT, factor)
    return moved / factor


def _moved(collector: Collector, samples: Samples, reference_BT: Tensor) -> float:
    return collector.processes.broadcast(gap(collector.log_probs(Role.POLICY, samples), reference_BT, samples))


def _magnified(collector: Collector, samples: Samples, reference_BT: Tensor, factor: float) -> float:
    """How far the policy would have moved, had its adapter moved so many times as far."""
    roles = collector.roles
    weights, starts = roles.weights(Role.POLICY), roles.weights(roles.reference)
    names = [name for name in weights if name in starts or "lora_B" in name]  # on a bare base B begins at zero
    with restored(weights[name] for name in names) as parts:
        for name, part in zip(names, parts, strict=True):
            start = part_of(starts[name]) if name in starts else 0.0
            part.copy_(start + factor * (part - start))
        return _moved(collector, samples, reference_BT)


def at_the_end(moved: float, rate_shares: list[float], steps: int) -> float:
    """What a movement in so many steps comes to at the end of the run, if every step goes as far and the same way.

    Args:
        moved: nats a token.
        rate_shares: each step's learning rate, as a share of the full one.
    """
    return moved / max(sum(rate_shares[:steps]), 1e-9) * max(sum(rate_shares), FEWEST_STEPS)
