"""What every stage says of its rows and of the weights that it keeps."""

from perl.results import Stage
from perl.system.progress import console, counted


def say_cut(cut: int, rows: int, length: int, key: str) -> None:
    """Say how many rows were cut to a length, if any were.

    Args:
        key: of the recipe, which gives the length.
    """
    if cut:
        verb = "is" if cut == 1 else "are"
        console.print(
            f"[yellow]{cut:,} of {counted(rows, 'row')} {verb} longer than {length} tokens ({key})[/]: the oldest "
            "turns are left out, whole ones where that is enough; the system's turn and the first token stay."
        )


def say_notes(stage: Stage) -> None:
    """Say which weights a stage kept, and what else people are to know."""
    for note in stage.notes:
        console.print(f"  {note}", markup=False)
