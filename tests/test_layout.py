"""Limits that keep the package readable: short files, and functions that fit a screen."""

import ast
from pathlib import Path

import perl

FILE, FUNCTION = 300, 60
"""Largest numbers of lines."""


def test_files_and_functions_are_short() -> None:
    root, long = Path(perl.__file__).parent, []
    for file in root.rglob("*.py"):
        text = file.read_text()
        name, lines = str(file.relative_to(root)), text.count("\n")
        long += [(name, lines)] if lines > FILE else []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                long += [(f"{name}: {node.name}", lines)] if lines > FUNCTION else []
    assert long == []
