"""The check of a library's undocumented interface: a version that has changed it is refused, not run wrong."""

import inspect
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from perl.errors import MachineError


def need(owner: Any, *names: str) -> None:
    """Check that a library's module, class or function still has what PERL uses of it.

    Args:
        owner: where the names are; of a function, they are parameters; an instance, for what its class sets in it.

    Raises:
        MachineError: a name is not there; library, version and name are said.
    """
    there = set(inspect.signature(owner).parameters) if inspect.isfunction(owner) else set(dir(owner))
    missing = [name for name in names if name not in there]
    if not missing:
        return
    module = owner.__name__ if inspect.ismodule(owner) else owner.__module__
    named = getattr(owner, "__qualname__", type(owner).__qualname__)
    library, within = module.partition(".")[0], "" if inspect.ismodule(owner) else f".{named}"
    try:
        installed = f"{library} {version(library)}"
    except PackageNotFoundError:
        installed = library
    raise MachineError(
        f"{installed} has no {', '.join(missing)} in {module}{within}, which PERL uses",
        where=library,
        remedy="Install the versions that PERL was tested with: pip install -c constraints.txt perl-rlhf",
    )
