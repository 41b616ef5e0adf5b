"""The check that every case must pass."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bad_input.cases import Case, contents
from tests.conftest import RunCli, WriteRecipe, write_rows

Refused = Callable[[Case], None]
RefusedIn = Callable[..., str]

REWARDS = """
def right(completions, **columns):
    return [0.0 for _ in completions]
number = 3
"""
TAKES = """
from perl.rl.rewards import REWARDS
REWARDS["length"] = None
"""


@pytest.fixture
def refused_in(run_cli: RunCli, tmp_path: Path) -> RefusedIn:
    """Run a command that must fail with one message and change no file; return its output."""

    def check(says: tuple[str, ...], *arguments: object, status: int = 2) -> str:
        before = contents(tmp_path)
        code, written = run_cli(*arguments)
        assert code == status, written
        assert "Traceback" not in written
        assert written.count("error: ") == 1, written
        for phrase in says:
            assert phrase in written
        assert contents(tmp_path) == before
        return written

    return check


@pytest.fixture
def refused(
    refused_in: RefusedIn,
    write_recipe: WriteRecipe,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Refused:
    """Run a case in its folder; the run must be refused."""

    def check(case: Case) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "own.py").write_text(REWARDS)
        (tmp_path / "bad.py").write_text("def f(:\n")
        (tmp_path / "takes.py").write_text(TAKES)
        changes = dict(case.changes)
        if case.rows is not None:
            file = tmp_path / "own.jsonl"
            file.write_bytes(case.rows) if isinstance(case.rows, bytes) else write_rows(file, case.rows)
            changes["data"] = {"source": "jsonl", "path": "own.jsonl"}
        if case.spoil is not None:
            case.spoil(Path(shutil.copytree(tiny_llama, tmp_path / "spoilt")))
            changes["base"] = {"model": "spoilt", "dtype": "float32"}
        recipe, out = write_recipe(**changes), tmp_path / "out"
        if case.recipe is not None:
            recipe.write_bytes(case.recipe)
        if case.out is not None:
            case.out(out)
        refused_in(case.says, case.command, recipe, *case.overrides, "--out", out, status=case.status)

    return check
