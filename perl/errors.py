"""Errors that are printed as one message: the user's mistakes, faults of the machine, bugs in processes."""

import errno
import os
import re
import traceback
from pathlib import Path
from typing import ClassVar


class UserError(Exception):
    """Unusable input: printed as one message, without a traceback; `status` is the exit code.

    Args:
        what: what is wrong, with the value.
        where: the file, line, key or folder.
        remedy: what to do about it.
    """

    status: ClassVar[int] = 2

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        message = f"{where}: {what}" if where else what
        super().__init__(f"{message}\n  {remedy}" if remedy else message)


class MachineError(UserError):
    """The input is right, but the machine lacks the disk space, memory, network or permission for it."""

    status = 1


class InternalError(UserError):
    """A bug in this package whose traceback has been written to a file."""

    status = 1


_GO_ON = "then run the same command again: finished work is kept."
_ROOM = f"Free some disk space there, {_GO_ON}"
_LIMIT = f"Raise that limit (`ulimit -a` shows it), {_GO_ON}"
_PERMISSION = "Get permission, or choose another place (--out; XDG_CACHE_HOME for caches)."
_MEMORY = (
    "`perl-rlhf estimate` shows what the recipe needs and what to lower: micro_batch_size, batch_size or "
    f"max_length; or set checkpoint_activations: true, {_GO_ON}"
)
LOADING = (
    "The weights alone do not fit: set base.dtype: bfloat16 or base.quantization: 4bit, or use a smaller base. "
    "`perl-rlhf estimate` shows what the recipe would need."
)
"""What to do if there is not enough memory to load a model."""
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _LIMIT,
    errno.EMFILE: _LIMIT,
    errno.ENFILE: _LIMIT,
    errno.EROFS: _PERMISSION,
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EIO: f"Check the disk, {_GO_ON}",
    errno.ENOMEM: _MEMORY,
}
_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")
"""Substrings of torch's RuntimeErrors about memory, on GPUs and CPUs."""


def machine_fault(error: BaseException, memory: str = _MEMORY) -> MachineError | None:
    """Return the fault of the machine that a library's exception reports, if any; a missing file is not one.

    Args:
        memory: what to do if there is too little memory.
    """
    message = str(error).strip().partition("\n")[0][:300]
    number, file = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
    if rust := re.search(r"\(os error (\d+)\)", message):  # from safetensors and tokenizers
        number = int(rust[1])
    no_memory = isinstance(error, RuntimeError) and any(words in message for words in _NO_MEMORY)
    if no_memory or isinstance(error, MemoryError):
        number = errno.ENOMEM
    if number not in _REMEDIES:
        return None
    cause = os.strerror(number)
    what = cause if file or not message else f"{cause} ({message})"
    remedy = memory if number == errno.ENOMEM else _REMEDIES[number]
    return MachineError(what, where=str(file or _place(error)), remedy=remedy)


def _place(error: BaseException) -> str:
    """Return the innermost function of this package, preferably of its stages, among the frames."""
    root = Path(__file__).parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(root)]
    in_stages = [f for f in frames if Path(f.filename).parent.name == "stages"]
    places = [f"{f.name} ({Path(f.filename).relative_to(root.parent)})" for f in in_stages or frames]
    return places[-1] if places else ""
