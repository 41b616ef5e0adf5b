"""Downloads public data at a pinned commit; every file is checked against its pinned hash and size."""

import contextlib
import hashlib
import http.client
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from perl.errors import MachineError, UserError, machine_fault
from perl.system.files import file_sha256, user_cache
from perl.system.progress import console

_TIMEOUT_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Pin:
    """Expected hash and size of a file."""

    sha256: str
    size: int
    path: str


@dataclass(frozen=True, slots=True)
class Repository:
    """A public repository on GitHub, `OWNER/NAME`, at a commit.

    Attributes:
        listing: a file with one line per published file: SHA-256, bytes, path.
    """

    name: str
    commit: str
    listing: Path

    @property
    def url(self) -> str:
        """Prefix of the URLs of its files."""
        return f"https://raw.githubusercontent.com/{self.name}/{self.commit}"

    @property
    def by_hand(self) -> str:
        """Remedy if a download fails."""
        folder = self.name.rpartition("/")[2]
        return (
            "Try again, or without a network clone the repository elsewhere and set data.path to the copy: "
            f"git clone https://github.com/{self.name} && git -C {folder} checkout {self.commit}"
        )


_HERE = Path(__file__).parent
TASKMASTER = Repository(
    "google-research-datasets/Taskmaster",
    "d92cb6af3005f1dc09c39e75e7daf4a04905e00b",
    _HERE / "taskmaster.sha256",
)
GSM8K = Repository("openai/grade-school-math", "3101c7d5072418e28b9008a6636bde82a006892c", _HERE / "math.sha256")
LLM_ADAPTERS = Repository("AGI-Edgerunners/LLM-Adapters", "8166572", _HERE / "math.sha256")


def cache_folder(repository: Repository) -> Path:
    """Return the folder of a repository's fetched data."""
    return user_cache() / repository.name.rpartition("/")[2].lower()


def pins(release: str, repository: Repository) -> list[Pin]:
    """Return the pinned files of a release, which is a folder of the repository."""
    lines = (line.split(maxsplit=2) for line in repository.listing.read_text(encoding="utf-8").splitlines())
    pinned = [Pin(sha256, int(size), path) for sha256, size, path in lines if path.startswith(f"{release}/")]
    if outside := [pin.path for pin in pinned if ".." in pin.path.split("/")]:
        what = f"{outside[0]!r} points outside its folder"
        raise UserError(what, where=str(repository.listing), remedy="Remove that line.")
    return pinned


def fetch(release: str, repository: Repository) -> Path:
    """Download a release's files, except those that have been fetched before.

    Args:
        release: a folder of the repository.

    Returns:
        The cache folder, in the repository's layout.

    Raises:
        UserError: a file is not the pinned one.
        MachineError: the network or the disk fails; complete files are kept.
    """
    root, needed = cache_folder(repository), pins(release, repository)
    with Progress(console=console) as progress:
        task = progress.add_task(release, total=sum(pin.size for pin in needed))
        for pin in needed:
            if not _is_right(root / pin.path, pin):
                _download(f"{repository.url}/{pin.path}", root / pin.path, pin, repository.by_hand)
            progress.advance(task, pin.size)
    return root


def _is_right(path: Path, pin: Pin) -> bool:
    try:
        return path.stat().st_size == pin.size and file_sha256(path) == pin.sha256
    except OSError:
        return False


def _download(url: str, target: Path, pin: Pin, by_hand: str) -> None:
    """Download to a temporary file and rename it, so that the target is either complete or absent."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            content = response.read(pin.size + 1)  # the largest pinned file has a few MB
        size, sha256 = len(content), hashlib.sha256(content).hexdigest()
        if (size, sha256) != (pin.size, pin.sha256):
            actual = f"{size:,} bytes, SHA-256 {sha256}" if size <= pin.size else f"more than {pin.size:,} bytes"
            what = f"is not the pinned file: {actual}; {pin.size:,} bytes, SHA-256 {pin.sha256} expected"
            raise UserError(what, where=url, remedy=by_hand)
        part.write_bytes(content)
        part.replace(target)
    except (OSError, http.client.HTTPException) as error:
        what = f"cannot be fetched to {target.parent}: {error or type(error).__name__}"
        raise machine_fault(error) or MachineError(what, where=url, remedy=by_hand) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
