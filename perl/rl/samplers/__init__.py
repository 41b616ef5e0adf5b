"""What draws completions. Importing this imports no torch: recipes are checked against the registry's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perl.rl.samplers.base import Sampler
    from perl.roles.roles import Roles


def _local(roles: Roles) -> Sampler:
    """The sampler in this process."""
    from perl.rl.samplers.local import LocalSampler

    return LocalSampler(roles)


SAMPLERS: dict[str, Callable[[Roles], Sampler]] = {"local": _local}
"""By the name that a recipe gives: a subclass of `Sampler`, or what makes one."""
