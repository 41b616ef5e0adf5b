"""RL with a reward function works without the libraries that SFT, the hub and engines need."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import WriteRecipe

PROJECT = Path(__file__).parents[1]
OPTIONAL = {"bitsandbytes", "datasets", "deepspeed", "trl"}
NEEDY = {
    *("perl.baselines.comparison", "perl.baselines.training", "perl.private.deepspeed", "perl.private.trl"),
    *("perl.stages.sft", "perl.stages.sft_encoder_decoder"),
}
"""Modules that need one of them and are imported inside functions."""
RUN = """
import sys
sys.modules.update(dict.fromkeys(sys.argv.pop().split()))
from perl.cli import main
main()
"""


def imported_at_once(module: Path) -> Iterator[str]:
    """Return the modules that are imported together with this one."""
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{one.name}" for one in node.names))


def test_they_are_imported_where_they_are_needed() -> None:
    for file in sorted((PROJECT / "perl").rglob("*.py")):
        name = ".".join(file.relative_to(PROJECT).with_suffix("").parts)
        if name in NEEDY:
            continue
        imported = set(imported_at_once(file))
        assert not {one.partition(".")[0] for one in imported} & OPTIONAL, name
        assert not imported & NEEDY, name


@pytest.mark.slow
def test_a_run_without_them(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, out = write_recipe(reward=None), tmp_path / "out"
    arguments = ["run", str(recipe), "--out", str(out), " ".join(sorted(OPTIONAL))]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((out / "report.json").read_text())["stages"]["rl"]["eval"]["n"] == 2
