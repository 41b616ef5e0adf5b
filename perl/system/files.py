"""Files and folders that are written atomically: complete or absent."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from perl.errors import UserError, machine_fault

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder to write into, which replaces `folder` when the block ends without an exception."""
    unfinished, before = (folder.with_name(f".{folder.name}.{state}") for state in ("unfinished", "before"))
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in (*unfinished.rglob("*"), unfinished):
            flush(path)
        if folder.exists():  # a non-empty folder cannot be replaced atomically
            shutil.rmtree(before, ignore_errors=True)
            folder.rename(before)
        unfinished.rename(folder)
        flush(folder.parent)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def user_cache() -> Path:
    """Return the cache folder, in `$XDG_CACHE_HOME` or `~/.cache`: all of it can be built or downloaded again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perl-rlhf"


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def text_if_any(file: Path, remedy: str) -> str | None:
    """Return a file's text; None if there is no such file.

    Raises:
        UserError: it is not text, with this remedy, or cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"not text: {error.reason}"
        raise machine_fault(error) or UserError(f"cannot be read: {why}", where=str(file), remedy=remedy) from None


def write_whole(file: Path, text: str) -> None:
    """Write a text file atomically: a reader sees the old content or the new. Links, pipes, devices are kept."""
    if file.exists() and not file.is_file():  # such as /dev/stdout
        file.write_text(text, encoding="utf-8")
        return
    file = Path(os.path.realpath(file))
    unfinished = file.with_name(f".{file.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    flush(unfinished)
    unfinished.replace(file)


def write_json(file: Path, value: Any) -> None:
    """Write a value as JSON, atomically; NaN and infinities are refused because JSON has none."""
    write_whole(file, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def user_named(path: Path) -> Iterator[None]:
    """Turn a failure to write the user's `path` into a UserError, or a MachineError if that is the cause."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise machine_fault(error) or UserError(
            f"cannot be written: {error.strerror}", where=str(path), remedy="Name another file."
        ) from None


def write_metrics(file: Path, metrics: Any) -> None:
    """Write metrics as JSON to the user's file. Raises `UserError` if it cannot be written."""
    with user_named(file):
        write_json(file, metrics)


def write_tensors(file: Path, tensors: "dict[str, Tensor]") -> None:
    """Write tensors as safetensors. Raises `OSError` if they cannot be written."""
    from safetensors.torch import save_file  # imports torch

    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(copies, file, {"format": "pt"})
    except SafetensorError as error:  # raised instead of an OSError
        raise OSError(errno.EIO, str(error), str(file)) from None


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of entries, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
