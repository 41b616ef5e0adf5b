"""Shortening dialogues: the system's turns stay, and the oldest of the others go, whole turns first."""

from bisect import bisect_left
from collections.abc import Callable, Sequence

from perl.data.records import Turn

Size = Callable[[Sequence[Turn], int], int]
"""Tokens of a dialogue whose turns from an index on are the completion."""


def newest_turns(turns: Sequence[Turn], first: int, size: Size, limit: int) -> tuple[list[Turn], int]:
    """The system's turns and the newest of the others, from a user's turn on, as many as fit.

    Where not even the last user's turn and what follows it fit, the longest of these are cut at the beginning,
    then the system's turn at the end; completions are not cut.

    Args:
        turns: a context, then the completion.
        first: where the completion begins.
        limit: in tokens.

    Returns:
        The turns, too long only where the completion alone is, and where it begins in them.
    """
    system = next((index for index, turn in enumerate(turns) if turn.speaker != "system"), len(turns))

    def since(start: int) -> tuple[list[Turn], int]:
        return [*turns[:system], *turns[start:]], max(system, system + first - start)

    completions = [index for index in range(first, len(turns)) if turns[index].speaker == "agent"]
    last = completions[-1] if completions else len(turns)
    starts = [index for index in range(system, last) if turns[index].speaker == "user"]
    if not starts:
        return _shortened(turns, first, size, limit)
    enough = bisect_left(starts, True, key=lambda start: size(*since(start)) <= limit)
    if enough < len(starts):
        return since(starts[enough])
    return _shortened(*since(starts[-1]), size, limit)


def _shortened(turns: Sequence[Turn], first: int, size: Size, limit: int) -> tuple[list[Turn], int]:
    turns = list(turns)
    others = [index for index, turn in enumerate(turns) if index < first or turn.speaker != "agent"]
    while others and (tokens := size(turns, first)) > limit:
        longest = max(others, key=lambda index: len(turns[index].text) * (turns[index].speaker != "system"))
        longest = longest if turns[longest].text else others[0]
        speaker, text = turns[longest].speaker, turns[longest].text
        if not text:
            break
        characters = sum(len(turn.text) for turn in turns)
        drop = max(1, (tokens - limit) * characters // tokens)
        turns[longest] = Turn(speaker, text[: -drop or None] if speaker == "system" else text[drop:])
    return turns, first
