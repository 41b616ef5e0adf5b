"""Runs that a command starts."""

import subprocess
import sys
import tempfile
from pathlib import Path

from perl.recipe import Recipe
from perl.system.files import write_whole


def run_apart(recipe: Recipe, folder: Path) -> None:
    """Run a recipe in a process of its own, for its peak memory; what is finished is not repeated."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "recipe.yaml"
        write_whole(file, recipe.to_yaml())
        done = subprocess.run([sys.executable, "-m", "perl", "run", str(file), "--out", str(folder)], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why
