"""Console messages that all stages share: truncated rows, and notes on the result."""

from perl.results import Stage
from perl.system.progress import console, counted


def say_cut(cut: int, rows: int, length: int, key: str) -> None:
    """Print how many rows were truncated, if any.

    Args:
        key: the recipe key that sets the length.
    """
    if cut:
        verb = "is" if cut == 1 else "are"
        answers = "" if key.startswith("rl.") else " An answer that is longer by itself is cut, too."
        console.print(
            f"[yellow]{cut:,} of {counted(rows, 'row')} {verb} longer than {length} tokens ({key})[/]: the oldest "
            "turns are dropped, as whole turns if possible; the system turn and the first token are kept."
            f"{answers}"
        )


def say_notes(stage: Stage) -> None:
    """Print a stage's notes, such as which weights it kept."""
    for note in stage.notes:
        console.print(f"  {note}", markup=False)
