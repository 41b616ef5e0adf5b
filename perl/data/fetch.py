"""Download the public data at a pinned commit; every file is checked against its pinned hash and size."""

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
_BY_HAND = (
    "Try again, or where there is no network clone the repository elsewhere and set data.path to the copy: "
    f"git clone https://github.com/google-research-datasets/Taskmaster && git -C Taskmaster checkout {COMMIT}"
)
_TIMEOUT_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Pin:
    """A file as it must be."""

    sha256: str
    size: int
    path: str


def cache_folder() -> Path:
    """Where fetched data goes by default, in `$XDG_CACHE_HOME` or `~/.cache`."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "perl-rlhf" / "taskmaster"


def pins(release: str, listing: Path = PINS) -> list[Pin]:
    """The pinned files of a release, which is a folder of the repository."""
    lines = (line.split(maxsplit=2) for line in listing.read_text(encoding="utf-8").splitlines())
    pinned = [Pin(sha256, int(size), path) for sha256, size, path in lines if path.startswith(f"{release}/")]
    if outside := [pin.path for pin in pinned if ".." in pin.path.split("/")]:
        what = f"{outside[0]!r} leads out of its folder"
        raise UserError(what, where=str(listing), remedy="Remove that line.")
    return pinned


def fetch(release: str, folder: Path | None = None, base_url: str = BASE_URL, listing: Path = PINS) -> Path:
    """Download a release's files, except those that are there already.

    Args:
        release: a folder of the repository.
        folder: where to put them, in the repository's layout; by default `cache_folder()`.
        base_url: the repository's address, without a slash at its end.
        listing: the file of pins.

    Returns:
        The folder, which `read_taskmaster` reads.

    Raises:
        UserError: a file is not the one pinned.
        MachineError: the network or the disk fails; whole files that were fetched are kept.
    """
    root, needed = folder or cache_folder(), pins(release, listing)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(release, total=sum(pin.size for pin in needed))
        for pin in needed:
            if not _is_right(root / pin.path, pin):
                _download(f"{base_url}/{pin.path}", root / pin.path, pin)
            progress.advance(task, pin.size)
    return root


def _is_right(path: Path, pin: Pin) -> bool:
    try:
        return path.stat().st_size == pin.size and _sha256(path.read_bytes()) == pin.sha256
    except OSError:
        return False


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _download(url: str, target: Path, pin: Pin) -> None:
    """Write beside the target and rename, so that the target is either whole or not there."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            content = response.read(pin.size + 1)  # the largest pinned file has a few MB
        size, sha256 = len(content), _sha256(content)
        if (size, sha256) != (pin.size, pin.sha256):
            actual = f"{size:,} bytes, SHA-256 {sha256}" if size <= pin.size else f"more than {pin.size:,} bytes"
            what = f"is not the file pinned: {actual}; {pin.size:,} bytes, SHA-256 {pin.sha256} expected"
            raise UserError(what, where=url, remedy=_BY_HAND)
        part.write_bytes(content)
        part.replace(target)
    except (OSError, http.client.HTTPException) as error:
        what = f"cannot be fetched into {target.parent}: {error or type(error).__name__}"
        raise machine_fault(error) or MachineError(what, where=url, remedy=_BY_HAND) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
