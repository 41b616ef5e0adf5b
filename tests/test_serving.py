"""Exports satisfy the published requirements of vLLM and TGI; commands and code of docs/serving.md work.

No engine runs here. Each requirement names its source in the repositories vllm-project/vllm and
huggingface/text-generation-inference.
"""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from perl.commands.export import export
from perl.roles.role import Role
from tests.conftest import RunCli
from tests.exported import Run, make, recipe_on
from tests.tiny import random_llama

ROOT = Path(__file__).parent.parent
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vllm/config/lora.py: MaxLoRARanks, the allowed values of --max-lora-rank; the default is 16."""
WEIGHT = re.compile(
    r"base_model\.model\.(model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_proj))\.lora_([AB])\.weight"
)
"""Names in a Llama. vLLM, vllm/lora/utils.py, parse_fine_tuned_lora_name: base_model.model.MODULE.lora_A.weight.
TGI, server/text_generation_server/adapters/lora.py, map_weights_for_model: the same."""
LLAMA_MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
"""vLLM, vllm/model_executor/models/llama.py, packed_modules_mapping and the other linear layers. TGI,
server/text_generation_server/utils/adapter.py, build_layer_weight_lookup: the same seven."""
LORA = {
    "all": {"rank": 2, "alpha": 4},
    "top-half": {"rank": 12, "alpha": 24, "layers": "top-half"},
    "attention": {"rank": 32, "alpha": 8.5, "targets": "attention"},
}


@pytest.fixture(scope="module")
def runs(tiny_llama: Path, mixed_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Return runs with adapters of different ranks on different modules."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: Run(make(folder / name, recipe_on(tiny_llama, mixed_data, name=name, lora=lora)))
        for name, lora in LORA.items()
    }


def adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "adapter_config.json").read_text()), load_file(
        folder / "adapter_model.safetensors"
    )


@pytest.mark.parametrize("name", list(LORA))
@pytest.mark.parametrize("role", [Role.SFT, Role.POLICY])
def test_vllm_can_load_an_exported_language_model(
    role: Role, name: str, runs: dict[str, Run], tmp_path: Path
) -> None:
    export(runs[name].folder, role, tmp_path / "out", False)
    # vllm/lora/lora_model.py, from_local_checkpoint: these two files, by these names.
    config, tensors = adapter(tmp_path / "out")
    # vllm/lora/peft_helper.py, PEFTHelper: required, with these types.
    assert isinstance(config["r"], int)
    assert config["r"] > 0
    assert isinstance(config["lora_alpha"], int) == (name != "attention")  # 8.5 stays a float
    assert isinstance(config["target_modules"], list)
    # vllm/lora/peft_helper.py, _validate_features and validate_legal: no other kind of LoRA.
    assert not config["modules_to_save"]
    assert config["bias"] == "none"
    assert config["init_lora_weights"] is True
    for feature in ("use_dora", "lora_bias", "use_rslora", "use_qalora", "rank_pattern", "alpha_pattern"):
        assert not config.get(feature), feature
    for feature in ("layer_replication", "alora_invocation_tokens", "use_bdlora", "trainable_token_indices"):
        assert config.get(feature) is None, feature
    # vllm/lora/lora_model.py, check_unexpected_modules: every tensor is A or B of a module that takes LoRA.
    found = {key: WEIGHT.fullmatch(key) for key in tensors}
    assert all(found.values())
    assert {match[3] for match in found.values() if match} <= LLAMA_MODULES
    pairs = {match[1]: {} for match in found.values() if match}
    for key, match in found.items():
        assert match is not None
        pairs[match[1]][match[4]] = tensors[key]
    for pair in pairs.values():
        assert pair["A"].shape[0] == pair["B"].shape[1] == config["r"]
    assert set(config["target_modules"]) == set(pairs)
    # vllm/config/lora.py: the rank is at most --max-lora-rank, which is one of a few.
    card = (tmp_path / "out" / "README.md").read_text()
    (limit,) = (int(number) for number in re.findall(r"--max-lora-rank (\d+)", card))
    assert limit in VLLM_RANKS
    assert limit == min(rank for rank in VLLM_RANKS if rank >= max(config["r"], 8))


@pytest.mark.parametrize("name", list(LORA))
def test_tgi_can_load_an_exported_language_model(name: str, runs: dict[str, Run], tmp_path: Path) -> None:
    run, out = runs[name], tmp_path / "out"
    export(run.folder, "policy", out, False)
    # adapters/lora.py, LoraConfig.load: by peft. utils/hub.py, _adapter_weight_files_from_dir: all safetensors
    # there but those called args, arguments or training.
    assert LoraConfig.from_pretrained(str(out)).r == LORA[name]["rank"]
    assert [file.name for file in out.glob("*.safetensors")] == ["adapter_model.safetensors"]
    # adapters/lora.py, prepare_weights: a kind of module is taken if every layer has it, and dropped without a
    # word if one has not; then all layers are stacked, so shapes are equal.
    _, tensors = adapter(out)
    kinds: dict[tuple[str, str], dict[int, Tensor]] = {}
    for key, tensor in tensors.items():
        match = WEIGHT.fullmatch(key)
        assert match is not None
        kinds.setdefault((match[3], match[4]), {})[int(match[2])] = tensor
    depth = run.session.roles.models()[0].config.num_hidden_layers
    for layers in kinds.values():
        assert set(layers) == set(range(depth))
        assert len({tensor.shape for tensor in layers.values()}) == 1
    # Modules that were not trained change nothing.
    run.session.load(Role.POLICY)
    trained = {run.session.roles.prefix + key for key in run.session.roles.weights(Role.POLICY)}
    assert len(tensors) - len(trained) == (14 if name == "top-half" else 0)
    assert all(not tensors[key].any() for key in tensors.keys() - trained)
    model = AutoPeftModelForCausalLM.from_pretrained(out).eval()
    ids = run.ids(
        [{"role": "user", "content": "A latte, please."}, {"role": "assistant", "content": "What size?"}]
    )
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = run.log_probs(Role.POLICY, ids)
    torch.testing.assert_close(
        log_probs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0], expected, rtol=0, atol=1e-5
    )


def test_a_rank_that_vllm_does_not_take_is_said(tiny_llama: Path, mixed_data: Path, tmp_path: Path) -> None:
    wide = Path(shutil.copytree(tiny_llama, tmp_path / "wide"))
    random_llama(hidden_size=576, intermediate_size=576, num_hidden_layers=1).save_pretrained(wide)
    recipe = recipe_on(wide, mixed_data, lora={"rank": 513}, reward=None, rl=None)
    export(make(tmp_path / "run", recipe), "sft", tmp_path / "out", False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "vllm serve" not in card
    assert "vLLM does not support adapters of rank 513: export with --merge" in card


def test_the_commands_and_the_code_of_the_docs(
    runs: dict[str, Run], run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run from top to bottom, in one folder with the runs runs/quickstart and runs/my."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("quickstart", "my"):
        (tmp_path / "runs" / name).symlink_to(runs["top-half"].folder)
    monkeypatch.setattr("perl.server.listen.serve", lambda app, listening: None)
    text = (ROOT / "docs" / "serving.md").read_text()
    variables: dict[str, Any] = {}
    served = 0
    for language, block in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL):
        if language == "python":
            exec(block, variables)
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["perl-rlhf"]:
                free = ["--port", "0"] if words[1] == "serve" else []
                code, said = run_cli(*words[1:], *free)
                assert code == 0, said
            elif "vllm" in words or "text-generation-launcher" in words:
                served += 1
    assert served >= 3
    said = [[{"role": "user", "content": "A latte, please."}, {"role": "assistant", "content": "What size?"}]]
    expected = runs["top-half"].scores(Role.REWARD, said)
    assert variables["scores"].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert [one["score"] for one in variables["piped"]] == pytest.approx(expected.tolist(), abs=1e-5)
    assert isinstance(variables["answer"], str)
