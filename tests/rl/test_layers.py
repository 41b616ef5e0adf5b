"""Layers of RL: its core takes plain values and does not import recipes, sessions or commands."""

import ast
from pathlib import Path

import perl.rl
from perl.plugins import REGISTRIES

ABOVE = ("perl.baselines", "perl.cli", "perl.commands", "perl.predict", "perl.recipe", "perl.stages", "perl.sweep")
REWARD_SECTIONS = Path("rewards/__init__.py")
"""The exception: the registry of rewards refers to recipe sections, for users who add to it."""


def test_nothing_in_rl_imports_what_uses_it() -> None:
    folder = Path(perl.rl.__file__).parent
    for file in folder.rglob("*.py"):
        if file.relative_to(folder) == REWARD_SECTIONS:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.startswith(ABOVE)], file


def test_plugins_can_add_to_what_is_looked_up_by_name() -> None:
    assert {"ALGORITHMS", "REWARDS", "SAMPLERS"} <= REGISTRIES.keys()
