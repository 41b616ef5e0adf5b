"""Checks of libraries' undocumented interfaces: a version in which one has changed is refused."""

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
"""The versions in constraints.txt, which is not part of the installed package."""


def need(owner: Any, *names: str) -> None:
    """Check that a library's module, class or function still has the names that PERL uses.

    Args:
        owner: has the names as attributes, or, if it is a function, as parameters.

    Raises:
        MachineError: a name is missing; the message gives the installed and the tested version.
    """
    if inspect.isfunction(owner):
        missing = [name for name in names if name not in inspect.signature(owner).parameters]
    else:
        missing = [name for name in names if not hasattr(owner, name)]  # torch.ops creates attributes on access
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
