"""Columns of other names than those of TRL's formats: what `data.columns` could say of them."""

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from perl.data.rows import parsed
from perl.data.tables import mapping_for, numbered_values

TRL_FORMATS = [
    {"prompt"},
    {"prompt", "completion"},
    {"messages"},
    {"prompt", "completion", "label"},
    {"prompt", "chosen", "rejected"},
    {"chosen", "rejected"},
]
"""The fields of each."""
UNREAD = "These columns are not read"
"""How a note begins of columns that have other names than those."""


def columns_in(path: Path) -> dict[str, str]:
    """What `data.columns` could say of a file whose columns have other names than the formats'; mostly nothing.

    Raises:
        UserError: it is of a form that is not read, or broken.
    """
    names, count = Counter[str](), 0
    with suppress(OSError):  # whoever reads its rows says so
        for _, value in numbered_values(path, {}):
            row = parsed("", value)
            names.update(list(row) if isinstance(row, dict) else [])
            count += 1
    return mapping_of(names, count)


def mapping_of(names: Counter[str], rows: int) -> dict[str, str]:
    """By the columns that most of so many rows have."""
    return mapping_for([name for name, count in names.items() if 2 * count > rows], TRL_FORMATS)


def mapping_hint(mapping: Mapping[str, str]) -> str:
    """What to add to the recipe so that columns of other names are read; empty if there are none."""
    if not mapping:
        return ""
    said = ", ".join(f"{field}: {name}" for field, name in mapping.items())
    return f"{UNREAD}: {', '.join(mapping.values())}. To read them, add data.columns: {{{said}}}"
