"""One rule for dropout in all stages: the base's is off; LoRA's is active in SFT and reward training."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from perl.stages.pipeline import TRAIN
from tests.conftest import RunCli, WriteRecipe

LORAS = 0.25
"""LoRA's dropout; the models' own is 0.1."""
ALL = {
    "sft": {"max_length": 64, "batch_size": 4},
    "reward": {"epochs": 1, "batch_size": 4, "max_length": 64},
    "rl": {
        "algorithm": "ppo",
        "critic": "adapter",
        "steps": 2,
        "prompts_per_step": 2,
        "max_new_tokens": 4,
        "eval_prompts": 2,
    },
}


@pytest.fixture(scope="module")
def tiny_opt(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an OPT, whose blocks call dropout as a function, and whose attention has its own dropout."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "tiny-opt", AutoTokenizer.from_pretrained(tiny_llama)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        dropout=0.1,
        attention_dropout=0.1,
        layerdrop=0.0,
    )
    with torch.random.fork_rng():
        OPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def dropped(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, float]]:
    """Count the calls of active dropout by stage and share, including attention's."""
    counts: Counter[tuple[str, float]] = Counter()
    stage = [""]
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def count_dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        counts[stage[0], p] += bool(training and p > 0)
        return dropout(x, p, training, inplace)

    def count_attention(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Any:
        counts[stage[0], dropout_p] += dropout_p > 0
        return attention(*args, dropout_p=dropout_p, **kwargs)

    def of(name: str, train: Any) -> Any:
        def run(session: Any) -> Any:
            stage[0] = name
            return train(session)

        return run

    monkeypatch.setattr(F, "dropout", count_dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", count_attention)
    for name, train in TRAIN.items():
        monkeypatch.setitem(TRAIN, name, of(name, train))
    return counts


COMBINATIONS = [
    pytest.param(tuning, model, checkpointing, marks=[pytest.mark.slow] * ((one + two + checkpointing) % 2))
    for one, tuning in enumerate(("lora", "full"))
    for two, model in enumerate(("tiny_gpt2", "tiny_opt"))
    for checkpointing in (False, True)
]
"""Each pair of settings; all combinations if time does not matter."""


@pytest.mark.parametrize(("tuning", "model", "checkpointing"), COMBINATIONS)
def test_dropout_acts_in_no_stage_but_where_the_recipe_asks_for_it(
    tuning: str,
    model: str,
    checkpointing: bool,
    dropped: Counter[tuple[str, float]],
    run_cli: RunCli,
    write_recipe: WriteRecipe,
    mixed_data: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    recipe = write_recipe(
        base={"model": str(request.getfixturevalue(model)), "dtype": "float32"},
        tuning=tuning,
        checkpoint_activations=checkpointing,
        lora={"rank": 2, "dropout": LORAS},
        data={"source": "jsonl", "path": str(mixed_data), "held_out": 0.3},
        **ALL,
    )
    status, written = run_cli("run", recipe, "--out", tmp_path / "out")
    assert status == 0, written
    acted = {at for at, times in dropped.items() if times}
    assert acted == ({("sft", LORAS), ("reward", LORAS)} if tuning == "lora" else set())
    assert {stage for stage, _ in dropped} >= set(TRAIN), "every stage was watched"
