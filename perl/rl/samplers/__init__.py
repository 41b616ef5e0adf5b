"""Samplers of completions. This module does not import torch, because recipes are checked against its registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perl.rl.samplers.base import Sampler
    from perl.roles.roles import Roles


@dataclass(frozen=True)
class SamplerSettings:
    """A recipe's settings of its sampler; all of them concern servers (`rl.sampler`, perl/recipe/rl.py)."""

    urls: tuple[str, ...] = ()
    """Without a trailing slash; several URLs are replicas of one another."""
    adapter_dir: str = ""
    time_limit: float = 600.0
    """Time limit of one completion, in seconds."""
    patience: float = 600.0
    """Seconds to wait for a server that does not answer."""
    in_flight: int = 256
    """Number of simultaneous requests to all servers together."""
    staleness: int = 0
    """Number of updates by which the sampling weights may be old: 0 or 1."""
    mismatch_limit: float | None = None
    """Allowed difference of sampler and policy, nats per token; None: by the base's dtype."""


def _local(roles: Roles, settings: SamplerSettings) -> Sampler:
    """Return the sampler in this process."""
    from perl.rl.samplers.local import LocalSampler

    return LocalSampler(roles, settings)


def _server(roles: Roles, settings: SamplerSettings) -> Sampler:
    """Return the sampler that uses servers with vLLM's API."""
    from perl.rl.samplers.server.sampler import ServerSampler

    return ServerSampler(roles, settings)


SAMPLERS: dict[str, Callable[[Roles, SamplerSettings], Sampler]] = {"local": _local, "server": _server}
"""Samplers by their names in recipes: a subclass of `Sampler`, or a function that creates one."""
