"""Plugins: a user's own files, named in a recipe's `plugins`, that add rows to the registries.

    from perl.rl.rewards import REWARDS
    REWARDS["keywords"] = Keywords

Each process imports a file once, before the recipe is checked, so that its other keys may name the added rows.
"""

import hashlib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from perl.errors import UserError
from perl.system.python_file import import_file

REGISTRIES = {
    "ADAPTERS": "perl.adapters",
    "ALGORITHMS": "perl.rl.algorithms",
    "BACKBONES": "perl.backbones",
    "REWARDS": "perl.rl.rewards",
    "SAMPLERS": "perl.rl.samplers",
    "SOURCES": "perl.data.sources",
}
"""The mappings from names to rows, and the modules they are in."""


class _Plugin(NamedTuple):
    sha256: str
    rows: list[tuple[str, str]]
    """Registry and name of each row."""


_loaded: dict[str, _Plugin] = {}


def load_plugins(files: Sequence[str], where: str) -> None:
    """Import the files that are not loaded yet or have changed since.

    Args:
        files: absolute paths.
        where: the key of the recipe that names them.

    Raises:
        UserError: no such file, an exception inside, or a name that is taken; the registries are as before.
    """
    for index, file in enumerate(files):
        if not (file.endswith(".py") and Path(file).is_file()):
            remedy = "Give the path of a Python file, from the recipe's folder."
            raise UserError(f"no such Python file {file!r}", where=f"{where}.{index}", remedy=remedy)
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        if file not in _loaded or _loaded[file].sha256 != digest:
            _loaded[file] = _Plugin(digest, _add_rows(file))


def plugin_sha256(file: str) -> str:
    """Return the SHA-256 of the file as it was loaded."""
    return _loaded[file].sha256


def adds_to(file: str) -> set[str]:
    """Return the registries that a plugin has added rows to."""
    return {registry for registry, _ in _loaded[file].rows}


def _add_rows(file: str) -> list[tuple[str, str]]:
    """Import a file and return the rows that it adds, after removing those of its earlier version."""
    registries: dict[str, dict[str, Any]] = {
        name: getattr(import_module(module), name) for name, module in REGISTRIES.items()
    }
    for registry, name in _loaded.pop(file, _Plugin("", [])).rows:
        registries[registry].pop(name, None)
    before = {registry: dict(rows) for registry, rows in registries.items()}
    try:
        import_file(Path(file))
        for registry, rows in registries.items():
            for name, row in before[registry].items():
                if rows.get(name) is not row:
                    raise UserError(
                        f"{name!r} in {registry} is taken by {_owner(registry, name)}",
                        where=file,
                        remedy="Give your row another name, and use that in the recipe.",
                    )
    except BaseException:
        for registry, rows in registries.items():
            rows.clear()
            rows.update(before[registry])
        raise
    return [(registry, name) for registry, rows in registries.items() for name in rows.keys() - before[registry]]


def _owner(registry: str, name: str) -> str:
    """Return the plugin file that a row comes from, or `a built-in`."""
    return next((file for file, plugin in _loaded.items() if (registry, name) in plugin.rows), "a built-in")
