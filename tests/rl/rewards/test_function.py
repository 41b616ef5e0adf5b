"""Users' reward functions: their return values and their parameters."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from perl.data.records import Prompt, Turn
from perl.errors import UserError
from perl.rl.rewards.function import RewardFunction
from perl.rl.samplers.base import Samples

NUMBERS = """
import numpy as np
import torch
def array(completions, **columns):
    return np.array([0.5, 1.0], dtype=np.float32)
def tensor(completions, **columns):
    return torch.tensor([0.5, 1.0])
def scalars(completions, **columns):
    return [torch.tensor(0.5), np.float64(1.0)]
def booleans(completions, **columns):
    return (np.bool_(len(text) > 1) if text == "b" else True for text in completions)
def largest(completions, **columns):
    return [1e30, -1e30]
def colour(completions, colour, **columns):
    return [float(one == "red") for one in colour]
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("array", [0.5, 1.0]),
        ("tensor", [0.5, 1.0]),
        ("scalars", [0.5, 1.0]),
        ("booleans", [1.0, 0.0]),
        ("largest", [1e30, -1e30]),
        ("colour", [0.0, 0.0]),
    ],
)
def test_numbers_of_every_kind_are_taken_and_columns_of_other_rows_too(
    name: str, expected: list[float], tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(NUMBERS)
    prompts = [Prompt((Turn("text", text),), text, {}) for text in ("one", "two")]
    reddish = Prompt((Turn("text", "red"),), "red", {"colour": "red"})
    reward = RewardFunction(f"{tmp_path}/own.py:{name}", [*prompts, reddish])
    samples = cast(Any, SimpleNamespace(completions=lambda: [[1], [2]]))
    assert reward(prompts, cast(Samples, samples), ["a", "b"]) == expected


NAMED = """
def seen(prompts, completions, completion_ids, **columns):
    assert (prompts, completions, completion_ids) == (["one"], ["a"], [[1]])
    return [float(columns == {"function": ["f"]})]
"""


@pytest.mark.parametrize("own_process", [False, True])
def test_columns_may_have_any_name_and_replace_no_completion(own_process: bool, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(NAMED)
    columns: dict[str, Any] = {"completions": ["good"], "prompts": "p", "completion_ids": 3, "function": "f"}
    prompt = Prompt((Turn("text", "one"),), "one", columns)
    reward = RewardFunction(f"{tmp_path}/own.py:seen", [prompt], own_process=own_process)
    assert reward([prompt], cast(Samples, SimpleNamespace(completions=lambda: [[1]])), ["a"]) == [1.0]


FAILING = """
import json
def divides(completions, **columns):
    yield 1.0
    yield 1 / 0
def unordered(completions, **columns):
    return {0.5, 1.0}
def parses(completions, **columns):
    return [json.loads(text) for text in completions]
"""


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("divides", r"own\.py:5: the reward function failed: ZeroDivisionError"),
        ("parses", r"own\.py:9: the reward function failed: JSONDecodeError(.|\n)*run the same command again"),
        ("unordered", r"must return 2 finite numbers, one per completion; it returned set"),
    ],
)
def test_a_failure_is_told_with_the_line_of_the_users_file(name: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FAILING)
    prompts = [Prompt((Turn("text", text),), text, {}) for text in ("one", "two")]
    reward = RewardFunction(f"{tmp_path}/own.py:{name}", prompts)
    samples = cast(Any, SimpleNamespace(completions=lambda: [[1], [2]]))
    with pytest.raises(UserError, match=what):
        reward(prompts, cast(Samples, samples), ["a", "b"])


SETTINGS = """
import torch
torch.set_grad_enabled(False)
def judge(completions, **columns):
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.bfloat16)
    yield 1.0
"""


def test_the_settings_of_torch_that_a_file_changes_are_restored(tmp_path: Path) -> None:
    """Scripts that only score with a model turn gradients off once for all; the policy needs them."""
    (tmp_path / "own.py").write_text(SETTINGS)
    prompt = Prompt((Turn("text", "one"),), "one", {})
    reward = RewardFunction(f"{tmp_path}/own.py:judge", [prompt])
    assert torch.is_grad_enabled()
    assert reward([prompt], cast(Samples, SimpleNamespace(completions=lambda: [[1]])), ["a"]) == [1.0]
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() is torch.float32
