"""Importing the user's Python file, and a function from it."""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from perl.errors import UserError


class UserCodeError(RuntimeError):
    """An exception of user code in another process.

    Args:
        what: its description, by `described`.
        where: its place, by `failed_line`.
    """

    def __init__(self, what: str, where: str) -> None:
        super().__init__(what, where)  # both, so that it can be pickled
        self.what, self.where = what, where


def import_file(file: Path) -> ModuleType:
    """Run a file as a new module, whose name also identifies its folder.

    Raises:
        UserError: the file raised an exception, which is given with its line.
    """
    file = file.absolute()
    folder = hashlib.sha256(str(file.parent).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"user_file_{file.stem}_{folder}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own code
        del sys.modules[spec.name]
        what = f"cannot be imported: {described(error)}"
        raise UserError(what, where=failed_line(file, error), remedy="Fix the file.") from error
    return module


def import_function(location: str) -> Callable[..., Any]:
    """Return the function at `FILE.py:NAME`.

    Raises:
        UserError: no such file or name.
    """
    file, _, name = location.rpartition(":")
    remedy = "Give FILE.py:NAME, with the file in the recipe's folder."
    if not (file.endswith(".py") and Path(file).is_file()):
        raise UserError("no such Python file", where=f"rl.reward.function {location}", remedy=remedy)
    function: Callable[..., Any] | None = getattr(import_file(Path(file)), name, None)
    if not callable(function):
        raise UserError(f"has no function {name!r}", where=file, remedy=remedy)
    return function


def described(error: BaseException) -> str:
    """Return an exception's type and message."""
    return error.what if isinstance(error, UserCodeError) else f"{type(error).__name__}: {error}"


def failed_line(file: Path, error: BaseException) -> str:
    """Return the file, and the line in it that failed if that is known.

    The innermost frame is often in a library that the file calls, which is not what the user has to correct.
    """
    if isinstance(error, UserCodeError):
        return error.where
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    if isinstance(error, SyntaxError) and error.filename == str(file):
        lines.append(error.lineno)
    return f"{file}:{lines[-1]}" if lines and lines[-1] else str(file)
