"""The downloader, against a local server: complete files, wrong files, and no network."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from perl.data.fetch import GSM8K, TASKMASTER, Repository, cache_folder, fetch, pins
from perl.data.sources import SOURCES, fetch_source
from perl.errors import UserError

FILES = {
    "TM-3-2020/reward/reward_00.json": b"[1]",
    "TM-3-2020/reward/reward_01.json": b"[2]" * 100_000,
    "TM-4-2024/data/data_00.json": b"[3]",
}
FIRST, SECOND, OTHER = FILES


@dataclass
class Server:
    url: str
    files: dict[str, bytes]
    announced: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state = Server("", dict(FILES))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.removeprefix("/")
            state.asked.append(path)
            if path not in state.files:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(state.announced.get(path, len(state.files[path]))))
            self.end_headers()
            self.wfile.write(state.files[path])

        def log_message(self, *_: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    yield state
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def repository(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """Yield Taskmaster's repository with these files on the local server."""
    path = tmp_path / "pins.sha256"
    lines = [f"{hashlib.sha256(data).hexdigest()}  {len(data)}  {name}\n" for name, data in FILES.items()]
    path.write_text("".join(lines))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Repository, "url", server.url)
    return replace(TASKMASTER, listing=path)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_fetches_what_the_source_needs_and_nothing_else(repository: Repository) -> None:
    assert fetch("TM-3-2020", repository) == cache_folder(repository)
    assert files_in(cache_folder(repository)) == {name: FILES[name] for name in (FIRST, SECOND)}


def test_good_files_are_kept_and_damaged_ones_fetched_again(server: Server, repository: Repository) -> None:
    folder = fetch("TM-3-2020", repository)
    server.asked.clear()
    (folder / FIRST).write_bytes(b"[9]")  # the size is right, the content is not
    fetch("TM-3-2020", repository)
    assert server.asked == [FIRST]
    assert (folder / FIRST).read_bytes() == b"[1]"


@pytest.mark.parametrize(
    ("served", "announced", "what"),
    [
        (b"[9]" * 100_000, None, "SHA-256"),  # another file of the same size
        (b"[2]" * 200_000, None, "more than 300,000 bytes"),
        (b"[2]" * 50_000, None, "150,000 bytes"),
        (b"[2]" * 50_000, 300_000, "150,000 bytes"),  # the connection breaks off
    ],
)
def test_a_wrong_file_is_refused_and_not_left_behind(
    server: Server, repository: Repository, served: bytes, announced: int | None, what: str
) -> None:
    server.files[SECOND] = served
    if announced:
        server.announced[SECOND] = announced
    with pytest.raises(UserError, match="is not the pinned file") as error:
        fetch("TM-3-2020", repository)
    assert what in error.value.what
    assert error.value.where == f"{server.url}/{SECOND}"
    assert list(files_in(cache_folder(repository))) == [FIRST], "what came before is kept, no part is left"


def test_errors_of_server_network_and_disk_tell_how_to_go_on(
    server: Server, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del server.files[FIRST]
    (tmp_path / "file").touch()
    cases = {
        "404": (server.url, tmp_path / "cache"),
        "refused": ("http://127.0.0.1:1", tmp_path / "cache"),
        "file": (server.url, tmp_path / "file"),  # a file where the folder should be
    }
    for cause, (url, cache) in cases.items():
        monkeypatch.setattr(Repository, "url", url)
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        with pytest.raises(UserError, match="cannot be fetched") as error:
            fetch("TM-3-2020", repository)
        assert cause in error.value.what
        assert "git clone" in error.value.remedy
        assert "data.path" in error.value.remedy
        assert TASKMASTER.commit in error.value.remedy


def test_a_source_that_is_not_fetched_is_refused() -> None:
    with pytest.raises(UserError, match="taskmaster-coffee, taskmaster-ticketing"):
        fetch_source("coffee-simulator")
    with pytest.raises(UserError, match="Did you mean taskmaster-ticketing"):
        fetch_source("taskmaster-tickets")


def test_the_pins_of_each_source_are_those_of_the_readers_folders() -> None:
    coffee, ticketing = (pins(release, TASKMASTER) for release in ("TM-4-2024", "TM-3-2020"))
    assert [sum(f"/{part}/" in pin.path for pin in coffee) for part in ("data", "reward")] == [8, 7]
    assert [pin.path for pin in ticketing] == [f"TM-3-2020/reward/reward_0{n}.json" for n in range(8)]
    assert all(len(pin.sha256) == 64 and pin.size > 100_000 for pin in (*coffee, *ticketing))


def test_what_can_be_fetched_is_fetched_as_its_reader_expects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in (name for name, source in SOURCES.items() if source.fetch):
        with pytest.raises(UserError, match=f"data fetch {name}"):
            SOURCES[name].read(None, 0)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(TASKMASTER) == tmp_path / "perl-rlhf" / "taskmaster"
    assert cache_folder(GSM8K) == tmp_path / "perl-rlhf" / "grade-school-math"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(TASKMASTER) == tmp_path / ".cache" / "perl-rlhf" / "taskmaster"
