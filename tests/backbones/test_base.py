"""The base: models that are refused, the content of its hash, and reproducible random weights."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, LlamaForCausalLM

from perl.backbones.base import weights_sha256
from perl.backbones.loading import load_base, load_config, random_base
from perl.errors import UserError
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from tests.tiny import LLAMA, lora

CPU = torch.device("cpu")
CONFIG = {"model_type": "llama", **LLAMA}


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    return copy


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hash_is_of_the_base_alone(model: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    folder = str(request.getfixturevalue(model))
    (base, lm), (again, _) = load_base(folder, dtype, CPU), load_base(folder, dtype, CPU)
    assert base.sha256 == again.sha256 == weights_sha256(lm)
    assert base.context_length == 256
    assert base.parameters == sum(parameter.numel() for parameter in base.load().parameters())

    roles = SharedBase(lora(lm, 2, 4))
    roles.add(Role.SFT)
    roles.add(Role.POLICY, copy_of=Role.SFT)
    roles.add(Role.REWARD, head=True)
    for parameter in roles.parameters_of(Role.SFT, Role.POLICY, Role.REWARD):
        parameter.data.normal_()
    assert roles.base_sha256() == base.sha256, "adapters are no part of it"

    next(lm.parameters()).data.view(-1)[0] += 1
    assert roles.base_sha256() != base.sha256


def test_the_hash_tells_dtypes_apart(tiny_llama: Path) -> None:
    hashes = {load_base(str(tiny_llama), dtype, CPU)[0].sha256 for dtype in (torch.float32, torch.bfloat16)}
    assert len(hashes) == 2


def test_the_hash_does_not_depend_on_how_weights_are_cut_into_files(
    tiny_llama: Path, copy_of: Callable[[Path], Path]
) -> None:
    sharded = copy_of(tiny_llama)
    (sharded / "model.safetensors").unlink()
    LlamaForCausalLM.from_pretrained(tiny_llama).save_pretrained(sharded, max_shard_size="20kB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    one, other = (load_base(str(folder), torch.float32, CPU)[0].sha256 for folder in (tiny_llama, sharded))
    assert one == other


def test_missing_weights_are_refused(tiny_llama: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(tiny_llama)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as caught:
        load_base(str(folder), torch.float32, CPU)
    assert "1 weights are not in its files, including model.layers.1.mlp.up_proj.weight" in str(caught.value)
    assert f"base.model {folder}" in str(caught.value)


def test_pickled_weights_are_refused(tiny_llama: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(tiny_llama)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_base(str(folder), torch.float32, CPU)
    assert "safetensors" in str(caught.value)


def test_a_tokenizer_too_large_for_the_model_is_refused(tiny_llama: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    tokenizer.add_tokens(["latte", "mocha"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=f"has {size + 2} tokens, the model only {size} embeddings") as caught:
        load_base(str(folder), torch.float32, CPU)
    assert "Use the tokenizer that belongs to this model" in str(caught.value)


def test_a_tokenizer_smaller_than_the_model_is_fine(tiny_llama: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(tiny_llama)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(320)
    model.save_pretrained(folder)
    base, _ = load_base(str(folder), torch.float32, CPU)
    assert len(base.tokenizer) < 320


def test_an_encoder_is_refused_unless_it_will_do(tiny_llama: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(tiny_llama)
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertForMaskedLM(config).save_pretrained(folder)
    for seed in (None, 0):
        with pytest.raises(UserError, match="BertForMaskedLM is an encoder") as caught:
            load_base(str(folder), torch.float32, CPU, random_seed=seed)
        assert "use a causal LM" in str(caught.value)


def test_what_is_no_language_model_is_refused(tiny_llama: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(tiny_llama)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaModel"]}))
    for seed, generates in itertools.product((None, 0), (False, True)):
        with pytest.raises(UserError, match="not a causal LM but LlamaModel") as caught:
            load_base(str(folder), torch.float32, CPU, random_seed=seed, generates=generates)
        assert "Give a hub id" in str(caught.value)


def test_a_configuration_of_no_causal_lm_is_refused(tiny_llama: Path, copy_of: Callable[[Path], Path]) -> None:
    """The configuration names no architecture: ViT has no causal head."""
    folder = copy_of(tiny_llama)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "vit", "hidden_size": 32, "num_attention_heads": 2})
    )
    for seed in (None, 0):
        with pytest.raises(UserError, match=r"base\.model .*: not a causal LM: transformers has none of type vit"):
            load_base(str(folder), torch.float32, CPU, random_seed=seed)
    with pytest.raises(UserError, match="of type vit"):
        load_config(str(folder))  # for `estimate`, which loads no weights
    with pytest.raises(UserError, match=r"base\.config: not a causal LM"):
        random_base({"model_type": "vit"}, torch.float32, CPU, 0)


def test_random_weights_repeat_with_their_seed_and_differ_with_another(tiny_llama: Path) -> None:
    state = torch.get_rng_state()
    first, again, other = (random_base(CONFIG, torch.float32, CPU, seed)[0] for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left as it was"

    of_folder = [load_base(str(tiny_llama), torch.float32, CPU, random_seed=seed)[0].sha256 for seed in (5, 5, 6)]
    assert of_folder[0] == of_folder[1] != of_folder[2]
    assert load_base(str(tiny_llama), torch.float32, CPU)[0].sha256 not in of_folder


def test_random_weights_need_no_weights_in_the_folder(tiny_llama: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(tiny_llama)
    (folder / "model.safetensors").unlink()
    _, lm = load_base(str(folder), torch.bfloat16, CPU, random_seed=0)
    assert next(lm.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [260, 300, 1000])
def test_a_random_base_has_a_tokenizer_of_its_size(size: int) -> None:
    base, _ = random_base({**CONFIG, "vocab_size": size}, torch.float32, CPU, 0)
    assert len(base.tokenizer) == size
    text = "User: a latte, naïve 😀"
    assert base.tokenizer.decode(base.tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "xyzzy"},
        {**CONFIG, "num_attention_heads": 5},
        {**CONFIG, "vocab_size": -1},
    ],
    ids=["empty", "unknown", "heads", "negative"],
)
def test_a_configuration_that_makes_no_model_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"base\.config") as caught:
        random_base(config, torch.float32, CPU, 0)
    assert "Set model_type" in str(caught.value)


def test_a_model_that_looks_ahead_is_refused() -> None:
    config = {
        "model_type": "bert",
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "initializer_range": 0.2,
    }
    for named, what in (
        ({}, "bert is an encoder"),
        ({"architectures": ["BertLMHeadModel"]}, "is not causal"),
        ({"is_decoder": True}, "transforms its logits after the output embedding"),
    ):
        with pytest.raises(UserError, match=what):
            random_base({**config, **named}, torch.float32, CPU, 0)
