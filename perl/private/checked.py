"""The check of private interfaces: that the installed version of a library still has the names used here."""

import inspect
from importlib import metadata
from types import FunctionType, ModuleType

from perl.errors import MachineError

TESTED = {
    "deepspeed": "0.19.8",
    "peft": "0.21.2",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
}
"""The version of each library that the tests run with: those of constraints.txt."""


def need(owner: object, *names: str) -> None:
    """Check that a module, class, object or function of a library has what this package uses of it.

    Args:
        owner: the module, class, object or function.
        names: its attributes; of a function, its parameters.

    Raises:
        MachineError: it lacks one; it names the library, its installed version, the attribute and the version
            tested.
    """
    kind = owner if isinstance(owner, type | FunctionType) else type(owner)
    place = owner.__name__ if isinstance(owner, ModuleType) else f"{kind.__module__}.{kind.__qualname__}"
    library = place.partition(".")[0]
    parameters = inspect.signature(owner).parameters if isinstance(owner, FunctionType) else ()
    for name in names:
        if not hasattr(owner, name) and name not in parameters:
            raise MachineError(
                f"{library} {metadata.version(library)} has no {place}.{name}, which perl-rlhf needs",
                remedy=f"Tested with {TESTED[library]}: pip install '{library}=={TESTED[library]}'",
            )
