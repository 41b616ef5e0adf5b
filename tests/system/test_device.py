"""A dtype without CPU instructions is reported before a run spends hours in it."""

import pytest
import torch

from perl.stages import material
from perl.system.device import slowdown
from tests.conftest import RunCli, WriteRecipe


def test_float32_is_as_fast_as_itself() -> None:
    assert 0.2 < slowdown(torch.float32) < 5


@pytest.mark.parametrize(("dtype", "named"), [("bfloat16", True), ("float32", False)])
def test_a_slow_dtype_is_named(
    dtype: str, named: bool, run_cli: RunCli, write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(material, "slowdown", lambda dtype: 7.2)
    recipe = write_recipe(base={"model": "nowhere", "dtype": dtype})
    _, text = run_cli("run", recipe)
    assert (
        "computes bfloat16 about 7 times slower than float32: base.dtype=float32" in " ".join(text.split())
    ) == named
