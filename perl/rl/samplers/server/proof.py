"""Whether what servers drew is of the role's weights of now: some of it is scored again here, in every draw.

An adapter that is silently not used is what goes wrong most, and every curve looks fine. Two things are required.
The server's log-probs are those here, within what the dtype rounds. And they have moved as the policy has since an
earlier version, because one that is one update old differs by less than any fixed limit. The earlier version stays
until the policy is far enough from it for the two to be told apart.

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
"""Of a server's completions in a draw that are scored again, those of its longest prompts: caches are of these."""
APART = 12
"""Times the rounding that the policy must have moved by for a stale version to be told from it."""
LEAST_NOISE = 1e-6
"""Nats per token."""


RAW = "its log-probs are those before the temperature. Start it with --logprobs-mode processed_logprobs."
STALE = (
    "it is stale: it serves {}. Load each version under a name and from a folder of its own, and name every "
    "replica in rl.sampler.url."
)
OTHER = "it serves {}. Start it as `perl-rlhf sampler RECIPE` says, and look at its log."
PARTLY = (
    "part of it is stale, as a prefix cache is where an adapter's files were written again. Restart the "
    "server, and let nothing but this run write into rl.sampler.adapter_dir."
)
DIFFERS = (
    "the server has another base, dtype or quantization, or another scale or rank. Start it as `perl-rlhf sampler "
    "RECIPE` says; if it is to round otherwise, raise rl.sampler.mismatch_limit."
)


class _Anchor(NamedTuple):
    """An earlier version of the policy."""

    name: str
    weights: dict[str, Tensor]


class Proof:
    """Scores completions again, and raises where they are not the role's.

    Args:
        limit: mean difference, nats per token; None: by the base's dtype.
    """

    def __init__(self, roles: SharedBase, limit: float | None) -> None:
        self._roles = roles
        self._limit = limit or CLOSE_LOG_PROBS[roles.lm.dtype]
        self._noise: float | None = None
        """What rounding makes between server and policy, nats per token: the most with nothing wrong."""
        self._anchor: _Anchor | None = None

    def require(self, role: Role, samples: Samples, sampling: Sampling, urls: Sequence[str]) -> None:
        """See that each server drew as the role.

        Args:
            urls: who drew each completion.

        Raises:
            ServerError: one did not; it names the likeliest cause.
        """
        assert samples.versions is not None
        name, policy = samples.versions[0], role is Role.POLICY
        anchor = self._anchor if policy and self._anchor is not None and self._anchor.name != name else None
        told_apart = policy and (anchor is not None or self._anchor is None)
        for url in dict.fromkeys(urls):
            rows = [row for row in range(len(urls)) if urls[row] == url]
            rows.sort(key=lambda row: -samples.prompt_lengths[row])
            seen = _Seen(self._roles, role, samples.take(rows[:ROWS]), sampling, anchor)
            told_apart &= self._judge(seen, f"what {url} draws as {name} is not of these weights")
        if told_apart:
            weights = self._roles.weights(Role.POLICY)
            self._anchor = _Anchor(name, {key: one.detach().clone() for key, one in weights.items()})

    def _judge(self, seen: "_Seen", fault: str) -> bool:
        """Whether a stale version would have been told apart, where there is an earlier one; else True."""
        processes, noise = self._roles.engine.processes, self._noise or LEAST_NOISE
        off, moved = seen.off, processes.broadcast(seen.moved)
        says, told_apart = "", moved > APART * noise
        if not off <= self._limit:
            says = f"{fault}: its log-probs are {off:.2g} nats per token off those here, at most {self._limit:.2g}"
        elif told_apart and off / moved > FOLLOWS + 3 * noise / moved:
            says = f"{fault}: its log-probs miss {off / moved:.0%} of how the policy has moved since {seen.since}"
        if any(processes.all_gather(says)):
            found = zip(processes.all_gather(says), processes.all_gather(seen.cause()), strict=True)
            what, cause = next((one, why) for one, why in found if one)
            raise ServerError(what, where="rl.sampler", remedy=f"It looks like this: {cause}")
        if told_apart or self._noise is None:
            self._noise = max(noise, processes.broadcast(off))
        return told_apart or not seen.since


class _Seen:
    """Completions, read here as the role and as what else may have drawn them."""

    def __init__(
        self, roles: SharedBase, role: Role, samples: Samples, sampling: Sampling, anchor: _Anchor | None
    ) -> None:
        self._roles, self._role, self._samples, self._sampling = roles, role, samples, sampling
        self.since = "" if anchor is None else anchor.name
        """The earlier version that the policy's movement is measured from, if any."""
        self._now_BT = self._earlier_BT = self._read(role)
        if anchor is not None:
            with holding(roles, role, anchor.weights):
                self._earlier_BT = self._read(role)

    @property
    def off(self) -> float:
        """The server's log-probs from those here, nats per token."""
        return self._from(self._now_BT)

    @property
    def moved(self) -> float:
        """The policy from its earlier version, nats per token; 0 where there is none."""
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
        """What the completions fit at least twice as well; what may be done about it."""
        fits: dict[str, Tensor] = {}
        if self._sampling.temperature != 1:
            fits[RAW] = self._read(self._role, 1.0)
        for other in sorted(self._roles.roles & {Role.BASE, Role.SFT, Role.POLICY} - {self._role}):
            what = "the base without the adapter" if other is Role.BASE else f"{other} in its place"
            fits[OTHER.format(what)] = self._read(other)
        if self.since:  # after the base: where RL begins on it, its first version computes the same
            fits[STALE.format(self.since)] = self._earlier_BT
        nearest = min(fits, key=lambda words: self._from(fits[words]), default=None)
        if nearest is not None and self._from(fits[nearest]) < self.off / 2:
            return nearest
        return PARTLY if self._is_between() else DIFFERS

    def _is_between(self) -> bool:
        """Whether the completions are of something between the earlier version and now."""
        mask_BT = self._samples.completion_mask_BT
        movement = (self._now_BT - self._earlier_BT)[mask_BT]
        followed = (self._samples.sampler_log_probs_BT - self._earlier_BT)[mask_BT]
        share = float((followed * movement).sum() / movement.square().sum().clamp(min=1e-12))
        return 0 < share < 0.95


@contextlib.contextmanager
def holding(roles: SharedBase, role: Role, weights: dict[str, Tensor]) -> Iterator[None]:
    """Inside, a role has other weights, by their names."""
    parameters = roles.weights(role)
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]
