"""4-bit bases: computation and training compared with their dequantized weights, and whole runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("bitsandbytes", reason="4-bit bases need it: pip install 'perl-rlhf[4bit]'")

from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import AutoPeftModelForCausalLM
from transformers import PreTrainedModel

from perl.backbones.base import weights_sha256
from perl.backbones.four_bit import four_bit_config, hide_quantization, keep_layout
from perl.backbones.loading import load_base
from perl.recipe.adapter import BUILT_IN
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from tests.conftest import RunCli, WriteRecipe
from tests.exported import Run
from tests.tiny import KINDS, adapter_of_kind

CPU = torch.device("cpu")
TINYSTORIES = Path(__file__).parents[3] / "shared" / "models" / "tinystories-656k"
STAGES: dict[str, Any] = {
    "sft": {"epochs": 2, "batch_size": 4, "max_length": 64, "learning_rate": 0.01},
    "reward": {"epochs": 2, "batch_size": 4, "max_length": 64, "learning_rate": 0.01},
    "rl": {
        "algorithm": "ppo",
        "critic": "adapter",
        "epochs": 2,
        "steps": 2,
        "prompts_per_step": 4,
        "max_new_tokens": 6,
        "eval_prompts": 3,
        "learning_rate": 0.01,
    },
}


def four_bit_base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_base(str(folder), dtype, CPU, four_bit=True)


def written_out(folder: Path, four_bit: PreTrainedModel) -> PreTrainedModel:
    """Return a plain model with the dequantized weights of the 4-bit one."""
    _, plain = load_base(str(folder), torch.float32, CPU)
    for name, module in four_bit.named_modules():
        if isinstance(module, Linear4bit):
            plain.get_submodule(name).weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state)
    return plain


def with_roles(lm: PreTrainedModel, layers: str = "all", kind: str = "lora") -> SharedBase:
    """Add roles whose adapters and heads are the same on every base."""
    roles = SharedBase(adapter_of_kind(lm, kind, layers=layers))
    generator = torch.Generator().manual_seed(3)
    for role in (Role.POLICY, Role.REWARD, Role.CRITIC):
        roles.add(role, head=role is not Role.POLICY)
        for parameter in roles.parameters_of(role):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return roles


CASES = [("lora", "tinystories", "all"), ("lora", "tinystories", "top-half"), ("lora", "tiny", "top-half")]
REFUSED = {name for name, settings in BUILT_IN.items() if settings.four_bit_refusal}
CASES += [(kind, "tiny", "all") for kind in KINDS if kind not in REFUSED]


@pytest.mark.parametrize(("kind", "model", "layers"), CASES)
def test_every_role_computes_and_learns_as_on_the_weights_written_out(
    tiny_llama: Path, kind: str, model: str, layers: str
) -> None:
    """Forward and backward run after bitsandbytes could have packed the weights for inference."""
    if model == "tinystories" and not TINYSTORIES.exists():
        pytest.skip("the real small model is not there")
    folder = tiny_llama if model == "tiny" else TINYSTORIES
    _, lm = four_bit_base(folder)
    sides = {
        "plain": with_roles(written_out(folder, lm), layers, kind),
        "4bit": with_roles(lm, layers, kind),
    }
    ids_BL = torch.randint(5, 250, (3, 12), generator=torch.Generator().manual_seed(0))
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    mask_BL[0, :4] = False
    said: dict[str, list[torch.Tensor]] = {}
    for name, roles in sides.items():
        found = said[name] = []
        with torch.no_grad():  # where they are packed, if they are
            roles(Role.REWARD, ids_BL, mask_BL, head=Role.REWARD)
        for role, asked in (
            (Role.POLICY, {"completion_length": 5, "temperature": 0.7}),
            (Role.REWARD, {"head": Role.REWARD}),
            (Role.CRITIC, {"completion_length": 5, "head": Role.CRITIC}),
        ):
            learned = roles.train_only(role)
            one = roles(role, ids_BL, mask_BL, **asked)
            out = next(value for value in (one.values_BT, one.scores_B, one.log_probs_BT) if value is not None)
            (out * torch.arange(1, out.numel() + 1).view_as(out)).sum().backward()
            found.append(out.detach())
            for parameter in learned:
                assert parameter.grad is not None
                found.append(parameter.grad)
    for plain, four_bit in zip(said["plain"], said["4bit"], strict=True):
        torch.testing.assert_close(four_bit, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


def test_the_hash_and_the_count_are_of_the_whole_weights(tiny_llama: Path) -> None:
    base, lm = four_bit_base(tiny_llama)
    plain, _ = load_base(str(tiny_llama), torch.float32, CPU)
    assert base.parameters == plain.parameters
    assert base.sha256 != plain.sha256
    assert base.sha256 == four_bit_base(tiny_llama)[0].sha256
    lm.model.layers[0].mlp.up_proj.weight.quant_state.absmax.mul_(2)
    assert weights_sha256(lm) != base.sha256


@pytest.mark.parametrize(
    "algorithm", ["ppo-adapter", pytest.param("ppo-shared", marks=pytest.mark.slow), "reinforce-shared"]
)
def test_all_stages_on_one_4_bit_base(
    run_cli: RunCli, write_recipe: WriteRecipe, tiny_llama: Path, mixed_data: Path, tmp_path: Path, algorithm: str
) -> None:
    name, critic = algorithm.split("-")
    rl = STAGES["rl"] | {"algorithm": name, "critic": critic, "epochs": 2 if name == "ppo" else 1}
    recipe = write_recipe(
        base={"model": str(tiny_llama), "dtype": "float32", "quantization": "4bit"},
        data={"source": "jsonl", "path": str(mixed_data), "held_out": 0.3},
        checkpoint_every=2,
        **{**STAGES, "rl": rl},
    )
    out = tmp_path / "out"
    code, text = run_cli("run", recipe, "--out", out)
    assert code == 0, text
    report = json.loads((out / "report.json").read_text())
    assert report["base"]["sha256_before"] == report["base"]["sha256_after"]
    assert report["stages"]["sft"]["eval"]["loss_after"] < report["stages"]["sft"]["eval"]["loss_before"]
    tensors = {str(f.relative_to(out)): load_file(f) for f in out.glob("*/adapter/*.safetensors")}
    learners = {"sft", "reward", "policy"} | ({"critic"} if critic == "adapter" else set())
    assert {file.split("/")[0] for file in tensors} >= learners
    for file, adapter in tensors.items():
        assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}, file
        assert all(tensor.any() for tensor in adapter.values()), file  # every factor was trained

    if algorithm == "ppo-adapter":
        before = {file: (out / file).read_bytes() for file in tensors}
        _check_it_goes_on(run_cli, recipe, out, before)
        _check_what_leaves_it(run_cli, recipe, out, tmp_path)


def _check_it_goes_on(run_cli: RunCli, recipe: Path, out: Path, before: dict[str, bytes]) -> None:
    """Check that the run resumes from checkpoints with identical bytes."""
    for role in ("reward", "policy"):
        (out / role / "result.json").unlink()
        for late in sorted((out / role / "checkpoints").iterdir())[1:]:
            late.rename(out.parent / f"{role}-{late.name}")
    code, text = run_cli("run", recipe, "--out", out)
    assert code == 0, text
    assert {file: (out / file).read_bytes() for file in before} == before


def _check_what_leaves_it(run_cli: RunCli, recipe: Path, out: Path, tmp_path: Path) -> None:
    """Check the other commands, and that peft on bitsandbytes gives the exported adapter's outputs."""
    for arguments in (("evaluate", out, "reward"), ("evaluate", out, "policy"), ("estimate", recipe)):
        code, text = run_cli(*arguments)
        assert code == 0, text
    code, text = run_cli("export", out, "policy", tmp_path / "policy")
    assert code == 0, text
    assert "--merge" not in text
    code, text = run_cli("export", out, "policy", tmp_path / "merged", "--merge")
    assert code == 2
    assert "trained on 4-bit weights" in " ".join(text.split())
    run = Run(out)
    ids = run.ids([{"role": "user", "content": "A mocha."}, {"role": "assistant", "content": "One mocha."}])
    expected_T = run.log_probs(Role.POLICY, ids)
    theirs = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "policy",
        dtype=torch.float32,
        quantization_config=four_bit_config(torch.float32),
        device_map="cpu",
    )
    keep_layout(theirs)  # bitsandbytes packs only weights larger than these, and fails on others
    logits_TV = theirs(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].detach()
    said_T = logits_TV.float().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(said_T, expected_T, atol=1e-4, rtol=0)


def test_memory_is_as_estimated(
    run_cli: RunCli, write_recipe: WriteRecipe, mixed_data: Path, tmp_path: Path
) -> None:
    if not TINYSTORIES.exists():
        pytest.skip("the real small model is not there")
    recipe = write_recipe(
        base={"model": str(TINYSTORIES), "dtype": "float32", "quantization": "4bit"},
        data={"source": "jsonl", "path": str(mixed_data), "held_out": 0.3},
        reward=STAGES["reward"],
        rl=None,
    )
    out = tmp_path / "out"
    assert run_cli("run", recipe, "--out", out)[0] == 0
    assert run_cli("estimate", recipe, "--json", tmp_path / "estimate.json")[0] == 0
    estimated = json.loads((tmp_path / "estimate.json").read_text())["lora"]
    for stage, result in json.loads((out / "report.json").read_text())["stages"].items():
        measured, predicted = result["memory"]["load"]["kinds"], estimated[stage]["load"]["kinds"]
        assert predicted["base_weights"] == pytest.approx(measured["base_weights"], rel=0.01)
        assert predicted["adapters"] == measured["adapters"]
        assert estimated[stage]["update"]["peak"] == pytest.approx(result["memory"]["update"]["peak"], rel=0.1)


def test_libraries_are_not_told_for_as_long_as_they_train(tiny_llama: Path) -> None:
    _, lm = four_bit_base(tiny_llama)
    with hide_quantization(lm):
        assert not lm.is_quantized
        assert not lm.is_loaded_in_4bit
    assert lm.is_quantized
    assert lm.is_loaded_in_4bit


def test_random_weights_are_not_quantized(run_cli: RunCli, write_recipe: WriteRecipe, tiny_llama: Path) -> None:
    base = {"model": str(tiny_llama), "random_init": True, "dtype": "float32", "quantization": "4bit"}
    code, text = run_cli("run", write_recipe(base=base))
    assert code == 2
    assert "random weights cannot be quantized" in text
