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
from perl.roles.roles import Role, Roles
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
    starts = _starts(roles)
    for _ in range(TRIES if starts else 0):
        if NATS <= moved <= 5 * NATS or (factor == 1.0 and moved > NATS):
            break
        factor = max(1.0, factor * (min(2 * NATS / moved, MOST) if moved > 0 else MOST))
        moved = _magnified(collector, samples, reference_BT, starts, factor)
    return moved / factor


def _moved(collector: Collector, samples: Samples, reference_BT: Tensor) -> float:
    return collector.processes.broadcast(gap(collector.log_probs(Role.POLICY, samples), reference_BT, samples))


def _starts(roles: Roles) -> dict[str, Tensor | float]:
    """What the policy's adapter began as: the reference's, or on a bare base what a new one has by definition."""
    if not isinstance(roles, SharedBase):
        return {}
    known: dict[str, Tensor | float] = {
        name: part_of(start) for name, start in roles.weights(roles.reference).items()
    }
    for name in roles.weights(Role.POLICY):
        if name not in known and (value := roles.adapter.starting_value(name)) is not None:
            known[name] = value
    return known


def _magnified(
    collector: Collector, samples: Samples, reference_BT: Tensor, starts: dict[str, Tensor | float], factor: float
) -> float:
    """How far the policy would have moved, had its adapter moved so many times as far."""
    weights = collector.roles.weights(Role.POLICY)
    with restored(weights[name] for name in starts) as parts:
        for start, part in zip(starts.values(), parts, strict=True):
            part.copy_(start + factor * (part - start))
        return _moved(collector, samples, reference_BT)


def at_the_end(moved: float, rate_shares: list[float], steps: int) -> float:
    """What a movement in so many steps comes to at the end of the run, if every step goes as far and the same way.

    Args:
        moved: nats a token.
        rate_shares: each step's learning rate, as a share of the full one.
    """
    return moved / max(sum(rate_shares[:steps]), 1e-9) * max(sum(rate_shares), FEWEST_STEPS)
