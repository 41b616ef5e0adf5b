"""The check of a library's undocumented interface: a version that has changed it is refused, not run wrong."""

import inspect
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from perl.errors import MachineError

TESTED = {
    "accelerate": "1.15.0",
    "deepspeed": "0.19.8",
    "peft": "0.21.2",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
}
"""The versions that the tests run with: those of constraints.txt, which an installed package does not have."""


def need(owner: Any, *names: str) -> None:
    """Check that a library's module, class or function still has what PERL uses of it.

    Args:
        owner: where the names are; of a function, they are parameters; an instance, for what its class sets in it.

    Raises:
        MachineError: a name is not there; library, installed version, name and the version tested are said.
    """
    if inspect.isfunction(owner):
        parameters = inspect.signature(owner).parameters
        missing = [name for name in names if name not in parameters]
    else:  # some modules make their attributes when they are asked for
        missing = [name for name in names if not hasattr(owner, name)]
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
        remedy=f"It was tested with {library} {TESTED[library]}: pip install '{library}=={TESTED[library]}'",
    )
