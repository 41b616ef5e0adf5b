"""Checks that servers sample with the role's current weights: some completions of every draw are scored again.

The most common fault is an adapter that is silently not used, and every curve looks fine. Two conditions are
required. The server's log-probs must equal those computed here, up to rounding of the dtype. And they must have
moved as the policy has since an earlier version, because a version that is one update old differs by less than any
fixed limit. The earlier version is kept until the policy is far enough from it to distinguish the two.

Axis letters: B completions, T completion positions.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from perl.rl.checks.findings import CLOSE_LOG_PROBS
from perl.rl.checks.tracking import FOLLOWS, gap
from perl.rl.collector import read_completions
from perl.rl.samplers.base import Samples, Sampling
from perl.rl.samplers.server.client import ServerError
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase

ROWS = 8
"""Completions per server and draw that are scored again, those of the longest prompts, which caches hold."""
APART = 12
"""Multiple of the rounding by which the policy must have moved for a stale version to be distinguishable."""
LEAST_NOISE = 1e-6
"""Smallest assumed rounding, nats per token."""


RAW = "its log-probs are from before the temperature. Start it with --logprobs-mode processed_logprobs."
STALE = (
    "it is stale: it serves {}. Load each version under a separate name and from a separate folder, and name "
    "every replica in rl.sampler.url."
)
OTHER = "it serves {}. Start it with the command of `perl-rlhf sampler RECIPE`, and look at its log."
PARTLY = (
    "part of it is stale, like a prefix cache after an adapter's files were overwritten. Restart the server, and "
    "let nothing but this run write into rl.sampler.adapter_dir."
)
DIFFERS = (
    "the server has another base, dtype or quantization, or another scale or rank. Start it with the command of "
    "`perl-rlhf sampler RECIPE`; if it is meant to round differently, raise rl.sampler.mismatch_limit."
)


class _Anchor(NamedTuple):
    """An earlier version of the policy."""

    name: str
    weights: dict[str, Tensor]


class Proof:
    """Scores completions again and raises if they are not the role's.

    Args:
        limit: largest mean difference, nats per token; None: by the base's dtype.
    """

    def __init__(self, roles: SharedBase, limit: float | None) -> None:
        self._roles = roles
        self._limit = limit or CLOSE_LOG_PROBS[roles.lm.dtype]
        self._noise: float | None = None
        """Rounding between server and policy, nats per token: the largest difference without a fault."""
        self._anchor: _Anchor | None = None

    def require(self, role: Role, samples: Samples, sampling: Sampling, urls: Sequence[str]) -> None:
        """Check that each server sampled as the role.

        Args:
            urls: the server of each completion.

        Raises:
            ServerError: a server did not; the message names the most likely cause.
        """
        assert samples.versions is not None
        name, policy = samples.versions[0], role is Role.POLICY
        anchor = self._anchor if policy and self._anchor is not None and self._anchor.name != name else None
        told_apart = policy and (anchor is not None or self._anchor is None)
        for url in dict.fromkeys(urls):
            rows = [row for row in range(len(urls)) if urls[row] == url]
            rows.sort(key=lambda row: -samples.prompt_lengths[row])
            seen = _Seen(self._roles, role, samples.take(rows[:ROWS]), sampling, anchor)
            told_apart &= self._judge(seen, f"the completions of {url} as {name} are not from these weights")
        if told_apart:
            weights = self._roles.weights(Role.POLICY)
            self._anchor = _Anchor(name, {key: one.detach().clone() for key, one in weights.items()})

    def _judge(self, seen: "_Seen", fault: str) -> bool:
        """Return whether a stale version would have been noticed; True if there is no earlier version."""
        processes, noise = self._roles.engine.processes, self._noise or LEAST_NOISE
        off, moved = seen.off, processes.broadcast(seen.moved)
        says, told_apart = "", moved > APART * noise
        if not off <= self._limit:
            says = f"{fault}: its log-probs differ by {off:.2g} nats per token from ours, limit {self._limit:.2g}"
        elif told_apart and off / moved > FOLLOWS + 3 * noise / moved:
            says = f"{fault}: its log-probs miss {off / moved:.0%} of the policy's movement since {seen.since}"
        if any(processes.all_gather(says)):
            found = zip(processes.all_gather(says), processes.all_gather(seen.cause()), strict=True)
            what, cause = next((one, why) for one, why in found if one)
            raise ServerError(what, where="rl.sampler", remedy=f"Likely cause: {cause}")
        if told_apart or self._noise is None:
            self._noise = max(noise, processes.broadcast(off))
        return told_apart or not seen.since


class _Seen:
    """Completions, read here as the role and as the alternatives that may have sampled them."""

    def __init__(
        self, roles: SharedBase, role: Role, samples: Samples, sampling: Sampling, anchor: _Anchor | None
    ) -> None:
        self._roles, self._role, self._samples, self._sampling = roles, role, samples, sampling
        self.since = "" if anchor is None else anchor.name
        """The earlier version from which the policy's movement is measured, if any."""
        self._now_BT = self._earlier_BT = self._read(role)
        if anchor is not None:
            with holding(roles, role, anchor.weights):
                self._earlier_BT = self._read(role)

    @property
    def off(self) -> float:
        """Difference of the server's log-probs from ours, nats per token."""
        return self._from(self._now_BT)

    @property
    def moved(self) -> float:
        """Movement of the policy from its earlier version, nats per token; 0 without one."""
        return gap(self._now_BT, self._earlier_BT, self._samples)

    def _from(self, log_probs_BT: Tensor) -> float:
        return gap(log_probs_BT, self._samples.sampler_log_probs_BT, self._samples)

    def _read(self, role: Role, temperature: float | None = None) -> Tensor:
        temperature, size = temperature or self._sampling.temperature, self._sampling.prompts_at_once
        log_probs_BT, _ = read_completions(
            self._roles, role, self._samples, size, temperature=temperature, head=None
        )
        assert log_probs_BT is not None
        return log_probs_BT

    def cause(self) -> str:
        """Return the alternative that fits the completions at least twice as well, with its remedy."""
        fits: dict[str, Tensor] = {}
        if self._sampling.temperature != 1:
            fits[RAW] = self._read(self._role, 1.0)
        for other in sorted(self._roles.roles & {Role.BASE, Role.SFT, Role.POLICY} - {self._role}):
            what = "the base without the adapter" if other is Role.BASE else f"{other} instead"
            fits[OTHER.format(what)] = self._read(other)
        if self.since:  # after the base, because a first version on the bare base computes the same
            fits[STALE.format(self.since)] = self._earlier_BT
        nearest = min(fits, key=lambda words: self._from(fits[words]), default=None)
        if nearest is not None and self._from(fits[nearest]) < self.off / 2:
            return nearest
        return PARTLY if self._is_between() else DIFFERS

    def _is_between(self) -> bool:
        """Return whether the completions lie between the earlier version and the current one."""
        mask_BT = self._samples.completion_mask_BT
        movement = (self._now_BT - self._earlier_BT)[mask_BT]
        followed = (self._samples.sampler_log_probs_BT - self._earlier_BT)[mask_BT]
        share = float((followed * movement).sum() / movement.square().sum().clamp(min=1e-12))
        return 0 < share < 0.95


@contextlib.contextmanager
def holding(roles: SharedBase, role: Role, weights: dict[str, Tensor]) -> Iterator[None]:
    """Give a role other weights, by their names, inside the block."""
    parameters = roles.weights(role)
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]
