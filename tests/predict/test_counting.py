"""Counted operations against numbers worked by hand; fake tensors for part of a step equal real ones for all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from perl.measure.probe import Phase
from perl.predict import TRY, Trial, TrialSession, read_subject, trace, trial_session
from perl.predict.counting import CountingMeter, Work, added, counted, scaled
from perl.recipe import Recipe
from tests.conftest import write_rows
from tests.tiny import LLAMA

ROWS, WIDTH, OUT = 40, 64, 48
PRODUCT = 2 * ROWS * WIDTH * OUT


def flops(work: Work, **wanted: str) -> float:
    return sum(
        count * one.flops for one, count in work.items() if all(getattr(one, k) == v for k, v in wanted.items())
    )


def test_a_linear_layer_and_who_calls_it() -> None:
    layer, x = nn.Linear(WIDTH, OUT, bias=False), torch.ones(ROWS, WIDTH, requires_grad=True)
    with counted() as work:
        layer(x).sum().backward()
    assert flops(work, kind="product", issuer="training") == PRODUCT
    assert flops(work, kind="product", issuer="backward") == 2 * PRODUCT
    with counted() as work, torch.no_grad():
        layer(x)
    (product,) = [one for one in work if one.flops]
    assert (product.kind, product.issuer, product.dtype, product.flops) == ("product", "model", "float32", PRODUCT)
    assert product.bytes == 4 * (ROWS * WIDTH + WIDTH * OUT + ROWS * OUT)
    # The transposed weight is a view: a call that moves nothing.
    assert sorted((one.bytes, count) for one, count in work.items() if not one.flops) == [(0, 1)]


def test_through_a_frozen_layer_only_the_inputs_gradient() -> None:
    layer = nn.Linear(WIDTH, OUT, bias=False).requires_grad_(False)
    with counted() as work:
        layer(torch.ones(ROWS, WIDTH, requires_grad=True)).sum().backward()
    assert flops(work, issuer="backward") == PRODUCT


def test_a_checkpointed_block_is_computed_once_more() -> None:
    layer, x = nn.Sequential(nn.Linear(WIDTH, OUT), nn.Tanh()), torch.ones(ROWS, WIDTH, requires_grad=True)
    with counted() as work:
        checkpoint(layer, x, use_reentrant=False).sum().backward()  # type: ignore[no-untyped-call]
    assert flops(work) == 4 * PRODUCT
    assert flops(work, issuer="training") == 2 * PRODUCT  # Python calls it again


@pytest.mark.parametrize(
    ("rows", "kind"), [(ROWS, "product"), (16, "rows")], ids=["many rows", "a token for each sequence"]
)
def test_kinds_of_products(rows: int, kind: str) -> None:
    with counted() as work:
        torch.ones(rows, WIDTH) @ torch.ones(WIDTH, OUT)
        torch.ones(rows, WIDTH) @ torch.ones(WIDTH, 8)
        torch.ones(3, rows, WIDTH) @ torch.ones(3, WIDTH, 1)
        torch.ones(2, 4, rows, 16).softmax(-1)
        torch.nn.functional.embedding(torch.zeros(5, dtype=torch.long), torch.ones(1000, WIDTH))
    moved = {one.kind: one for one in work if one.bytes}
    assert list(kind for kind in moved if moved[kind].flops) == [kind, "rank", "cache"]
    assert moved["exponential"].bytes == 2 * 4 * 2 * 4 * rows * 16
    (embedding,) = [one for one in work if one.kind == "other" and one.bytes == 2 * 4 * 5 * WIDTH + 8 * 5]
    assert embedding.flops == 0  # five rows of the table are read, not all


def test_sums_of_work() -> None:
    with counted() as work:
        torch.ones(ROWS, WIDTH) @ torch.ones(WIDTH, OUT)
    total = added(scaled(work, 3), scaled(work, -1))
    assert total == {operation: 2 * count for operation, count in work.items()}


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewarded")
    (folder / "rewards.py").write_text("def one(completions, **columns):\n    return [1.0 for _ in completions]\n")
    prompts = [f"{'A latte, please. ' * 8}Number {index}." for index in range(12)]
    rows = [{"prompt": prompt, "completion": "One latte."} for prompt in prompts]
    return write_rows(folder / "rows.jsonl", rows)


def rl_recipe(data: Path, **changes: Any) -> Recipe:
    rl = {
        "algorithm": "reinforce",
        "prompts_per_step": 6,
        "micro_batch_size": 2,
        "max_prompt_length": 48,
        "max_new_tokens": 16,
        "reward": {"function": f"{data.parent}/rewards.py:one"},
    }
    shape = {"model_type": "llama", **LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
    content: dict[str, Any] = {
        "name": "counted",
        "base": {"config": {**shape, "num_hidden_layers": 2}, "random_init": True, "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"source": "jsonl", "path": str(data), "held_out": 0.3},
        "rl": rl,
    }
    return Recipe.model_validate(content | changes)


def on_real_tensors(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> dict[Phase, Work]:
    """Count a whole step: every token, row and micro-batch."""
    monkeypatch.setattr(TrialSession, "meter", lambda self: CountingMeter(self.device, self.resident(), [], 2))
    with trial_session(recipe, Trial(2)) as session:
        return TRY["rl"](session).work


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_step_tried_in_part_counts_as_the_whole(
    tuning: str, rewarded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = rl_recipe(rewarded, tuning=tuning)
    found, whole = trace(recipe, read_subject(recipe), "rl").work, on_real_tensors(recipe, monkeypatch)
    assert set(found) == set(whole) == {"generate", "score", "update"}
    for phase, work in whole.items():
        assert flops(found[phase]) == pytest.approx(flops(work), rel=1e-6), phase
        for kind in ("product", "rank", "attention"):
            assert flops(found[phase], kind=kind) == pytest.approx(flops(work, kind=kind), rel=1e-6), (phase, kind)
        calls, expected = sum(found[phase].values()), sum(work.values())
        assert calls == pytest.approx(expected, rel=0.25), phase


def test_generation_with_a_cache_counts_each_token_once(rewarded: Path) -> None:
    recipe = rl_recipe(rewarded, tuning="full")
    work = trace(recipe, read_subject(recipe), "rl").work["generate"]
    block = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    # Six prompts of 48 tokens, then 15 tokens that are read; 16 are drawn.
    linear = 6 * (48 + 15) * 2 * 2 * block + 6 * 16 * 2 * 64 * LLAMA["vocab_size"]
    assert flops(work, kind="product") + flops(work, kind="rows") + flops(work, kind="rank") == linear
