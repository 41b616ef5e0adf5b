"""The benchmark runs, and refuses what it cannot run. TRL's side needs a release that is not installed here."""

import json
from pathlib import Path

import pytest

from perl.bench import command, work
from perl.bench.peak import PeakOverStart
from perl.errors import UserError
from tests.conftest import RunCli

TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}


def test_it_measures_both_tunings(run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(work.MODELS, "100m", TINY)
    file = tmp_path / "bench.json"
    code, text = run_cli("bench", "--repeats", "1", "--steps", "2", "--layers", "top-half", "--json", str(file))
    assert code == 0, text
    found = json.loads(file.read_text())
    assert set(found) == {"ours", "tuning_full", "lora_to_full"}
    for side in (found["ours"], found["tuning_full"]["ours"]):
        assert len(side["all_seconds"]) == 2
        assert min(side["all_seconds"]) <= side["seconds_per_step"] <= max(side["all_seconds"])
        assert set(side["phases"]) == {"generate", "score", "update"}
        assert side["peak_over_start_bytes"] > 0
    assert "LoRA / full" in text


def test_the_work_is_as_long_as_it_says(run_cli: RunCli, tmp_path: Path) -> None:
    """Prompts of 128 tokens, answers of 64, 16 of them: both sides do the same."""
    content = work.recipe("100m", "lora", "all", 4, checkpointing=False)
    assert (content["rl"]["max_prompt_length"], content["rl"]["max_new_tokens"]) == (128, 64)
    assert content["rl"]["epochs"] == 4
    for wrong, expected in (
        (["--layers", "some"], "--layers: 'some' is none of all, top-half"),
        (["--model", "2b"], "--model: '2b' is none of 100m, 1b, 8b"),
        (["--peer-trl", str(tmp_path)], "pip install --no-deps --target DIR trl==1.12.0"),
    ):
        code, text = run_cli("bench", *wrong)
        assert code == 2
        assert expected in " ".join(text.split())


def test_a_measurement_that_fails_says_why() -> None:
    with pytest.raises(UserError, match=r"bench ours: the measurement failed: pydantic.*Recipe"):
        command._measure("ours", ["no recipe", "1"], None)


def test_the_peak_is_what_was_held_beyond_the_start() -> None:
    with PeakOverStart() as peak:
        held = bytearray(200 * 2**20)
        for place in range(0, len(held), 4096):
            held[place] = 1
        peak._stop.wait(0.1)
        del held
    assert 190 * 2**20 < peak.bytes < 400 * 2**20
