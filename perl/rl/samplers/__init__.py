"""What draws completions. Importing this imports no torch: recipes are checked against the registry's names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perl.rl.samplers.base import Sampler
    from perl.roles.roles import Roles


@dataclass(frozen=True)
class SamplerSettings:
    """What a recipe says of its sampler; all of it is of servers (`rl.sampler`, perl/recipe/rl.py)."""

    urls: tuple[str, ...] = ()
    """Without a slash at the end; several are replicas of one another."""
    adapter_dir: str = ""
    time_limit: float = 600.0
    """Seconds that one completion may take."""
    patience: float = 600.0
    """Seconds in which a server that does not answer may come back."""
    in_flight: int = 256
    """Requests at once, to all servers."""
    staleness: int = 0
    """Updates that the weights may be old that a step's completions are drawn with: 0 or 1."""
    mismatch_limit: float | None = None
    """Nats per token between sampler and policy; None: by the base's dtype."""


def _local(roles: Roles, settings: SamplerSettings) -> Sampler:
    """The sampler in this process."""
    from perl.rl.samplers.local import LocalSampler

    return LocalSampler(roles, settings)


def _server(roles: Roles, settings: SamplerSettings) -> Sampler:
    """Servers that speak as vLLM does."""
    from perl.rl.samplers.server.sampler import ServerSampler

    return ServerSampler(roles, settings)


SAMPLERS: dict[str, Callable[[Roles, SamplerSettings], Sampler]] = {"local": _local, "server": _server}
"""By the name that a recipe gives: a subclass of `Sampler`, or what makes one."""
