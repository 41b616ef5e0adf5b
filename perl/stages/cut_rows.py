"""Rows that are too long are cut, and that is said."""

from perl.system.progress import console


def say_cut(cut: int, rows: int, length: int, key: str) -> None:
    """Say how many rows were cut to a length, if any were.

    Args:
        key: of the recipe, which gives the length.
    """
    if cut:
        console.print(
            f"[yellow]{cut} of {rows} rows are longer than {length} tokens ({key})[/]: their oldest turns are "
            "left out, whole ones where that is enough; the system's turn and the first token stay."
        )
