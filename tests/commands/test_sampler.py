"""`perl-rlhf sampler` prints a command that is quoted correctly for a shell."""

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from perl.recipe import load_recipe
from tests.conftest import RunCli, WriteRecipe

SERVER = ["rl.sampler.url=http://gpu-1:8001", "rl.sampler.adapter_dir=/shared/run"]


def printed(run_cli: RunCli, *arguments: object) -> list[str]:
    status, said = run_cli("sampler", *arguments)
    assert status == 0, said
    return shlex.split(said.replace("\\\n", " "))


def test_the_command_has_what_the_recipe_asks_for(write_recipe: WriteRecipe, run_cli: RunCli) -> None:
    recipe = write_recipe(sft={"epochs": 1, "batch_size": 4}, lora={"rank": 12, "alpha": 4})
    words = printed(run_cli, recipe, *SERVER, "rl.max_prompt_length=100", "rl.sampler.staleness=1")
    base = load_recipe(recipe).base.model
    assert words[words.index("vllm") :][:3] == ["vllm", "serve", base]
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in words
    options = dict(itertools.pairwise(words))
    assert options["--max-lora-rank"] == "16"
    assert options["--max-loras"] == "4"  # three of the policy, one of the reference
    assert options["--max-model-len"] == "104"
    assert options["--logprobs-mode"] == "processed_logprobs"
    assert options["--dtype"] == "float32"
    assert (options["--host"], options["--port"]) == ("gpu-1", "8001")


def test_on_a_cpu_it_avoids_what_ends_the_server_there(write_recipe: WriteRecipe, run_cli: RunCli) -> None:
    words = printed(run_cli, write_recipe(), "--cpu", *SERVER)
    assert {"TORCHDYNAMO_DISABLE=1", "--no-enable-chunked-prefill"} <= {*words}
    assert int(words[words.index("--max-num-batched-tokens") + 1]) >= 256
    assert words[words.index("-m") + 1] == "vllm.entrypoints.openai.api_server"


def test_each_replica_has_its_own_and_a_recipe_without_a_server_is_told_what_to_add(
    write_recipe: WriteRecipe, run_cli: RunCli
) -> None:
    urls = "rl.sampler.url=[http://a:1,http://b:2]"
    words = printed(run_cli, write_recipe(), urls, SERVER[1])
    assert [words[place + 1] for place, word in enumerate(words) if word == "--host"] == ["a", "b"]
    status, said = run_cli("sampler", write_recipe())
    assert status == 0
    assert "--port 8000" in said
    assert "url: http://127.0.0.1:8000, adapter_dir: DIR" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rl": None}, "Add a section rl"),
        ({"lora": None, "adapter": {"kind": "dora"}}, "kind lora or rslora"),
        ({"tuning": "full"}, "tuning lora"),
        ({"lora": {"rank": 600, "alpha": 4}}, "ranks up to 512"),
    ],
)
def test_what_no_server_can_do_is_refused(
    changes: dict[str, Any], words: str, write_recipe: WriteRecipe, run_cli: RunCli, tmp_path: Path
) -> None:
    status, said = run_cli("sampler", write_recipe(**changes))
    assert status == 2
    assert words in said


def test_the_server_of_a_reward_adapter(write_recipe: WriteRecipe, run_cli: RunCli, tmp_path: Path) -> None:
    """The command says that the base is a classifier; rank and base are those of the adapter."""
    out, adapter = tmp_path / "out", tmp_path / "adapter"
    assert run_cli("reward", write_recipe(lora={"rank": 9, "alpha": 4}), "--out", out)[0] == 0
    assert run_cli("export", out, "reward", adapter)[0] == 0
    recipe = write_recipe(reward=None, rl={"reward": {"kind": "server", "url": "http://b:8002", "model": "judge"}})
    words = printed(run_cli, recipe, "--reward", adapter)
    options = dict(itertools.pairwise(words))
    assert options["--lora-modules"] == f"judge={adapter}"
    assert (options["--host"], options["--port"], options["--max-lora-rank"]) == ("b", "8002", "16")
    assert (options["--runner"], options["--convert"]) == ("pooling", "classify")
    assert json.loads(options["--hf-overrides"])["architectures"] == ["LlamaForSequenceClassification"]
    assert "--logprobs-mode" not in words
    status, said = run_cli("sampler", write_recipe(), "--reward", adapter)
    assert status == 0
    assert "{kind: server, url: http://127.0.0.1:8001}" in said
    weights = load_file(adapter / "adapter_model.safetensors")
    read_too = {"base_model.model.likelihood.out.bias": torch.zeros(1)}
    save_file(weights | read_too, adapter / "adapter_model.safetensors")
    status, said = run_cli("sampler", recipe, "--reward", adapter)
    assert status == 2
    assert "also uses likelihood" in said
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": None}))
    for folder, expected in ((tmp_path / "nowhere", "no adapter"), (adapter, "this adapter has no head")):
        status, said = run_cli("sampler", recipe, "--reward", folder)
        assert status == 2
        assert expected in said
