"""PERL: RLHF in which every learned part is an adapter on one frozen base.

As a library: `load_recipe`, `run` and `load_run`. They are imported when they are asked for, torch with them.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perl.errors import UserError
    from perl.library import LoadedRun, load_run, run
    from perl.recipe import Recipe, load_recipe

__version__ = "0.1.0"
__all__ = ["LoadedRun", "Recipe", "UserError", "__version__", "load_recipe", "load_run", "run"]

_HOMES = {
    "LoadedRun": "perl.library",
    "Recipe": "perl.recipe",
    "UserError": "perl.errors",
    "load_recipe": "perl.recipe",
    "load_run": "perl.library",
    "run": "perl.library",
}

# Where these are installed, peft and TRL import them, and at that they warn: of a kernel that there could be,
# and that a machine without a GPU has none.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("DeepSpeed").addFilter(lambda record: "accelerator to CPU" not in record.getMessage())


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
