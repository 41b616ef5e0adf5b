"""`algorithms`: the table of RL algorithms."""

from perl.rl.algorithm import SWITCHES, Algorithm
from perl.rl.algorithms import ALGORITHMS

COLUMNS = ("name", *SWITCHES, "critic", "group", "updates", "constants")


def algorithms() -> None:
    """Print the table of RL algorithms, one line per row.

    A recipe names a row in rl.algorithm and overrides any cell or constant of it: rl.surrogate, rl.clip, …
    docs/algorithms.md says what each row is for.
    """
    table = [COLUMNS, *(_cells(name, row) for name, row in ALGORITHMS.items())]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def _cells(name: str, row: Algorithm) -> tuple[str, ...]:
    used = row.in_use()
    constants = ", ".join(f"{key} {str(value).lower()}" for key, value in used.items() if key not in SWITCHES)
    critic = "yes" if row.needs_critic else "no"
    switches = [str(used[key]) for key in SWITCHES]
    return (name, *switches, critic, str(row.samples_per_prompt), str(row.epochs), constants)
