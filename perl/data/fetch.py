"""Downloads the public data at a pinned commit, and checks every file against its pinned hash and size."""

import contextlib
import hashlib
import http.client
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from perl.errors import MachineError, UserError, machine_fault

COMMIT = "d92cb6af3005f1dc09c39e75e7daf4a04905e00b"
BASE_URL = f"https://raw.githubusercontent.com/google-research-datasets/Taskmaster/{COMMIT}"
PINS = Path(__file__).with_name("taskmaster.sha256")
"""A line a file as published at `COMMIT`: SHA-256, bytes, path."""

FETCHABLE = {"taskmaster-coffee": "TM-4-2024/", "taskmaster-ticketing": "TM-3-2020/"}
"""What each source needs: the pinned files whose path begins so."""

_TIMEOUT_SECONDS = 60
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Pin:
    """A file as it must be."""

    sha256: str
    size: int
    path: str


def cache_folder() -> Path:
    """Where fetched data lies unless another folder is named: `$XDG_CACHE_HOME` or `~/.cache`."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "perl-rlhf" / "taskmaster"


def pins(source: str, listing: Path = PINS) -> list[Pin]:
    """The pinned files of a source.

    Raises:
        UserError: the source is not one that is fetched.
    """
    if source not in FETCHABLE:
        remedy = f"These can be fetched: {', '.join(FETCHABLE)}."
        raise UserError(f"there is nothing to fetch for {source!r}", remedy=remedy)
    lines = (line.split(maxsplit=2) for line in listing.read_text(encoding="utf-8").splitlines())
    needed = [Pin(sha256, int(size), path) for sha256, size, path in lines if path.startswith(FETCHABLE[source])]
    for pin in needed:
        if ".." in pin.path.split("/"):
            what = f"{pin.path!r} leads out of its folder"
            raise UserError(what, where=str(listing), remedy="Remove that line.")
    return needed


def fetch(source: str, folder: str | Path | None = None, base_url: str = BASE_URL, listing: Path = PINS) -> Path:
    """Downloads a source's files, keeping those that are already there and right.

    Args:
        source: one of `FETCHABLE`.
        folder: where to put them, in the repository's layout; by default `cache_folder()`.
        base_url: the folder's address, without a slash at its end.
        listing: the file of pins.

    Returns:
        The folder, which `read_taskmaster` reads.

    Raises:
        UserError: the source is not one that is fetched, or a file is not the one pinned.
        MachineError: the network or the disk fails. What was fetched before is kept; a file is never left half
            written.
    """
    root = Path(os.path.expanduser(folder)) if folder else cache_folder()
    needed = pins(source, listing)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(source, total=sum(pin.size for pin in needed))
        for pin in needed:
            target = root / pin.path
            if not _is_right(target, pin):
                _download(f"{base_url}/{pin.path}", target, pin)
            progress.advance(task, pin.size)
    return root


def _is_right(path: Path, pin: Pin) -> bool:
    try:
        return path.stat().st_size == pin.size and hashlib.sha256(path.read_bytes()).hexdigest() == pin.sha256
    except OSError:
        return False


def _download(url: str, target: Path, pin: Pin) -> None:
    """Writes beside the target and renames, so that the target is either whole or not there."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        digest, size = _stream(url, part, pin.size)
        if (digest, size) != (pin.sha256, pin.size):
            found = f"more than {pin.size:,} bytes" if size > pin.size else f"{size:,} bytes, SHA-256 {digest}"
            what = f"is not the file pinned: {found}; {pin.size:,} bytes, SHA-256 {pin.sha256} expected"
            raise UserError(what, where=url, remedy=_by_hand())
        part.replace(target)
    except (OSError, http.client.HTTPException) as error:
        what = f"cannot be fetched into {target.parent}: {error or type(error).__name__}"
        raise machine_fault(error) or MachineError(what, where=url, remedy=_by_hand()) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _stream(url: str, part: Path, expected: int) -> tuple[str, int]:
    """Downloads to a file and gives its SHA-256 and bytes; stops once there are more than expected."""
    digest, size = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response, part.open("wb") as file:
        while size <= expected and (chunk := response.read(_CHUNK_BYTES)):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def _by_hand() -> str:
    return (
        "Try again, or where there is no network clone the repository elsewhere and set data.path to the copy: "
        "git clone https://github.com/google-research-datasets/Taskmaster && "
        f"git -C Taskmaster checkout {COMMIT}"
    )
