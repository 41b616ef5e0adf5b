"""What a launcher says in the environment; without torch, for who asks before that is imported."""

import os


def ranks() -> tuple[int, int, int]:
    """Rank, number of processes and rank on this host: 0, 1, 0 without a launcher."""
    rank, count, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    )
    return rank, count, local
