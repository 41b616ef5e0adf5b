"""`rate` and `serve` as commands: inputs that they refuse before loading anything."""

import socket
from pathlib import Path

import pytest

from perl.server import listen
from tests.conftest import RunCli


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["rate", "RUN", "--choose", "best"], "'best' is not one of random, uncertainty"),
        (["rate", "nowhere"], "not a run folder"),
        (["rate", "RUN", "--raters", " ,"], "--raters: contains no name"),
        (["serve", "nowhere", "--port", 0], "not a run folder"),
        (["rate", "RUN", "--host", "203.0.113.1"], "203.0.113.1:8010: cannot listen there"),
        (["rate", "RUN", "--port", "TAKEN"], "cannot listen there"),
        (["serve", "RUN", "--port", 70000], "--port"),
    ],
)
def test_what_cannot_be_served_is_an_error(
    arguments: list[object], what: str, run_cli: RunCli, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x\nbase: {model: none}\nreward: {}\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"RUN": tmp_path, "TAKEN": taken.getsockname()[1]}
        status, written = run_cli(*(names.get(str(one), one) for one in arguments))
    assert status == 2, written
    assert what in written
    assert not (tmp_path / "ratings.jsonl").exists()


@pytest.mark.parametrize(("command", "what"), [("rate", "are in the file"), ("serve", "no more requests")])
def test_ctrl_c_says_what_is_left(
    command: str, what: str, run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("perl.server.listen.require_server", interrupted)
    status, written = run_cli(command, tmp_path)
    assert status == 130
    assert what in written


def test_without_the_extra_it_is_named(run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "find_spec", lambda name: None)
    for command in ("rate", "serve"):
        status, written = run_cli(command, tmp_path)
        assert status == 2
        assert f"perl-rlhf {command}: needs starlette and uvicorn, which are not installed" in written
        assert "pip install 'perl-rlhf[rate]'" in written
