"""Progress without a bar: the log of a long run regularly shows its position."""

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from perl.system import progress
from tests.conftest import RunCli


def test_a_line_every_half_minute_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(progress, "LINE_EVERY", 0.001)
    monkeypatch.setattr(progress, "console", Console(file=written, soft_wrap=True))
    with progress.track("rl", 100, done=10) as advance:
        while "rl 10 of 100 … 0 min 00 s" not in written.getvalue().splitlines():
            time.sleep(0.001)
        advance(reward=0.25)
        while "rl 11 of 100  reward 0.25 … 0 min 00 s" not in written.getvalue().splitlines():
            time.sleep(0.001)


def test_a_long_silence_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work without its own progress prints what it is doing; of nested work, the innermost is printed."""
    written = io.StringIO()
    monkeypatch.setattr(progress, "LINE_EVERY", 0.001)
    monkeypatch.setattr(progress, "console", Console(file=written, soft_wrap=True))
    with progress.doing("rl"), progress.doing("judging the policy"):
        while "policy" not in written.getvalue():
            time.sleep(0.001)
    assert "judging the policy … 0 min 00 s" in written.getvalue().splitlines()
    assert not progress._doing


def test_counted() -> None:
    assert [progress.counted(number, "step") for number in (0, 1, 2000)] == ["0 steps", "1 step", "2,000 steps"]


def test_words_between_colons_are_not_emojis(
    capsys: pytest.CaptureFixture[str], run_cli: RunCli, tmp_path: Path
) -> None:
    progress.console.print("error: own.py:two: the function failed")
    assert "own.py:two:" in capsys.readouterr().err
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Is a long enough question about :two: also quoted as it was written?"}\n')
    assert "about :two: also" in run_cli("data", "leaks", rows, rows)[1]
