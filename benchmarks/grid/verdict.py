"""What a cell's metrics say, in a word."""

from typing import Any, Literal

Verdict = Literal["up", "flat", "down", "failed"]

SHRUNK = 0.5
"""Share of the base's length, or of its different completions; with less and no gain a policy has collapsed."""


def verdict(result: dict[str, Any]) -> Verdict:
    """Whether the reward rose: `up` and `down` where the paired interval excludes 0."""
    if "interval" not in result:
        return "failed"
    low, high = result["interval"]
    return "up" if low > 0 else "down" if high < 0 else "flat"


def collapsed(result: dict[str, Any]) -> bool:
    """Whether the run made the policy worse: less reward; or no more, of completions that shrank or became one."""
    word = verdict(result)
    if word in ("up", "failed"):
        return False
    return word == "down" or any(
        result[f"{name}_after"] < SHRUNK * result[f"{name}_before"] for name in ("tokens", "distinct")
    )


def incidents(result: dict[str, Any]) -> list[str]:
    """The run's own alarms, such as `length (stopped at 43)`."""
    found = result.get("run", {}).get("incidents", [])
    return [f"{one['name']} ({one['action']} at {one['step']})" for one in found]
