"""The value of `learning_rate: auto`, and its use in a stage."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, LlamaConfig, PreTrainedConfig

from perl.recipe import Recipe, StageName
from perl.stages.auto_rates import auto_head_learning_rate, learning_rate
from tests.conftest import RunCli, WriteRecipe


def rate(stage: StageName, config: PreTrainedConfig, /, **changes: Any) -> float:
    content = {
        "name": "any",
        "base": {"model": "any"},
        "data": {"source": "jsonl", "path": "any"},
        "sft": {},
        "reward": {},
        "rl": changes.pop("rl", {"algorithm": "reinforce", "epochs": 1}),
        **changes,
    }
    return learning_rate(Recipe.model_validate(content), stage, config)


def llama(width: int) -> LlamaConfig:
    return LlamaConfig(hidden_size=width, num_attention_heads=4)


def test_it_falls_with_width_and_full_tuning_gets_a_tenth() -> None:
    assert rate("rl", llama(128)) == 4e-3
    assert rate("rl", llama(4096)) == pytest.approx(2.5e-4, rel=0.05)
    assert rate("sft", llama(128)) == rate("reward", llama(128)) == 2e-3
    assert rate("reward", llama(4096)) == pytest.approx(1.25e-4, rel=0.05)
    assert rate("reward", llama(4096), tuning="full") == pytest.approx(1.25e-5, rel=0.05)
    assert rate("reward", llama(4096), reward={"learning_rate": 3e-4}) == 3e-4


def test_the_updates_from_a_rollout_share_it() -> None:
    assert rate("rl", llama(4096), rl={"algorithm": "ppo", "epochs": 4}) == pytest.approx(2.5e-4 / 4, rel=0.05)
    assert rate("rl", llama(4096), rl={"algorithm": "ppo", "epochs": 2, "minibatches": 2}) == pytest.approx(
        2.5e-4 / 4, rel=0.05
    )
    cispo, grpo = (rate("rl", llama(128), rl={"algorithm": name}) for name in ("cispo", "grpo"))
    assert cispo == grpo / 2


def test_kinds_of_adapters_and_of_models_have_their_factors() -> None:
    assert rate("reward", llama(4096), adapter={"kind": "ia3"}) == pytest.approx(25 * 1.25e-4, rel=0.05)
    assert rate("reward", llama(4096), adapter={"kind": "dora"}) == rate("reward", llama(4096))
    for kind in ("series", "parallel"):  # measured with 32 units, in each of which the output's step has a part
        for size, expected in {8: 6e-3, 32: 6e-3, 256: 7.5e-4}.items():
            assert rate("reward", llama(128), adapter={"kind": kind, "bottleneck": size}) == expected
        assert rate("reward", llama(128), adapter={"kind": kind}) == 7.5e-4, "the default bottleneck is 256"
    assert rate("reward", llama(128), adapter={"kind": "miss", "rank": 16}) == 2e-3
    assert rate("reward", llama(128), adapter={"kind": "miss"}) == 1e-3, "the default rank is 64"
    assert rate("rl", llama(8), adapter={"kind": "prefix"}) == 1.0, "a rate is 1 at most"
    encoder = BertConfig(hidden_size=384, num_attention_heads=4, architectures=["BertModel"])
    assert rate("reward", encoder) == pytest.approx(4e-4, rel=0.05)


def test_a_head_moves_values_alike_on_every_base() -> None:
    one = auto_head_learning_rate(128, 0.4)
    assert one == pytest.approx(32 * auto_head_learning_rate(4096, 0.4), rel=0.05)
    assert one == pytest.approx(50 * auto_head_learning_rate(128, 20.0), rel=0.05)


def test_stages_learn_at_it_and_say_so(
    run_cli: RunCli, write_recipe: WriteRecipe, mixed_data: Path, tmp_path: Path
) -> None:
    stage = {"epochs": 1, "batch_size": 4, "lr_scheduler_type": "constant"}
    recipe = write_recipe(
        data={"source": "jsonl", "path": str(mixed_data), "held_out": 0.3}, sft=stage, reward={**stage}, rl=None
    )
    code, text = run_cli("run", recipe, "--out", tmp_path / "out")
    assert code == 0, text
    expected = rate("sft", llama(32))
    for role in ("sft", "reward"):
        assert f"{role}: learning rate {expected:g}, from the base's width and kind" in text
        lines = (tmp_path / "out" / role / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[0])["learning_rate"] == pytest.approx(expected)
