"""Verdict on a cell's metrics, in one word."""

from typing import Any, Literal

Verdict = Literal["up", "flat", "down", "failed"]

SHRUNK = 0.5
"""A policy without gain has collapsed below this share of the base's length or of its distinct completions."""


def verdict(result: dict[str, Any]) -> Verdict:
    """Return whether the reward rose: `up` or `down` if the paired interval excludes 0."""
    if "interval" not in result:
        return "failed"
    low, high = result["interval"]
    return "up" if low > 0 else "down" if high < 0 else "flat"


def collapsed(result: dict[str, Any]) -> bool:
    """Return whether the policy got worse: less reward; or no gain, and far shorter or less varied completions."""
    word = verdict(result)
    if word in ("up", "failed"):
        return False
    return word == "down" or any(
        result[f"{name}_after"] < SHRUNK * result[f"{name}_before"] for name in ("tokens", "distinct")
    )


def incidents(result: dict[str, Any]) -> list[str]:
    """Return the run's own incidents, such as `length (stopped at 43)`."""
    found = result.get("run", {}).get("incidents", [])
    return [f"{one['name']} ({one['action']} at {one['step']})" for one in found]
