"""Bases that cannot be used."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from perl.backbones import hub
from tests.bad_input.cases import Case, named
from tests.bad_input.conftest import Refused


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return spoil


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def half_the_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def gpt2_without_tokenizer(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4)).save_pretrained(folder)


def pickled_weights(folder: Path) -> None:
    no_weights(folder)
    torch.save({}, folder / "pytorch_model.bin")


def pickled_shards(folder: Path) -> None:
    """Write a pickle that the index refers to, which a check of file names alone would miss."""
    shards = dict.fromkeys(load_file(folder / "model.safetensors"), "shard.bin")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    torch.save({}, folder / "shard.bin")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def more_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["flat white", "cortado"])
    tokenizer.save_pretrained(folder)


def an_adapter(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))


def masked_lm(folder: Path) -> None:
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    no_weights(folder)
    BertModel(config).save_pretrained(folder)


def longer_layers(folder: Path) -> None:
    edit_json("config.json", intermediate_size=80)(folder)


CASES = [
    Case("no such folder", ("no such folder", "base.model ./gone", "hub id"), overrides=("base.model=./gone",)),
    Case(
        "no such hub id, and no network",
        (
            "the hub was not queried, because HF_HUB_OFFLINE is set",
            "base.model no/such",
            "Check the name, and the network",
        ),
        overrides=("base.model=no/such",),
    ),
    Case("no name", ("not a model", "base.model", "hub id"), overrides=("base.model=''",)),
    Case("NUL in the name", ("not a model", "base.model", "hub id"), overrides=('base.model="a\\0b"',)),
    Case("half a surrogate", ("not a model", "base.model", "hub id"), overrides=('base.model="\\ud800"',)),
    Case("a file", ("no such folder", "own.py", "Give a hub id"), overrides=("base.model=own.py",)),
    Case("no config", ("not a model", "base.model", "config.json"), spoil=no_config),
    Case(
        "broken config",
        ("not a model", "base.model", "config.json"),
        spoil=lambda f: (f / "config.json").write_text("{"),
    ),
    Case(
        "unknown model",
        ("not a model", "xyzzy", "Give a hub id"),
        spoil=edit_json("config.json", model_type="xyzzy"),
    ),
    Case(
        "code of its own",
        ("Python code of its own, which is not run", "base.model", "base.trust_remote_code: true"),
        spoil=edit_json("config.json", model_type="xyzzy", auto_map={"AutoConfig": "own.Config"}),
    ),
    Case("an encoder", ("BertModel is an encoder", "base.model", "use a causal LM"), spoil=masked_lm),
    Case("no weights", ("cannot be loaded", "base.model", "model.safetensors"), spoil=no_weights),
    Case("pickled weights", ("pickle (pytorch_model.bin)", "base.model", "convert them"), spoil=pickled_weights),
    Case("pickled shards", ("pickle (shard.bin)", "base.model", "convert them"), spoil=pickled_shards),
    Case(
        "a pickle in disguise",
        ("cannot be loaded", "base.model", "model.safetensors"),
        spoil=lambda folder: torch.save({}, folder / "model.safetensors"),
    ),
    Case("half the weights", ("cannot be loaded", "base.model", "model.safetensors"), spoil=half_the_weights),
    Case(
        "other shapes",
        ("mlp.down_proj.weight is (32, 64)", "base.model", "Use the config.json"),
        spoil=longer_layers,
    ),
    Case(
        "missing weights",
        ("weights are not in its files", "model.layers.2.", "Complete the files"),
        spoil=edit_json("config.json", num_hidden_layers=3),
    ),
    Case("an adapter for a base", ("not a model", "base.model", "config.json"), spoil=an_adapter),
    Case(
        "mismatched vocabulary",
        ("the tokenizer has 302 tokens, the model only 300", "base.model", "the tokenizer that belongs"),
        spoil=more_tokens,
    ),
    Case(
        "broken tokenizer",
        ("no usable tokenizer", "base.model", "tokenizer.json"),
        spoil=lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0", "model"'),
    ),
    Case(
        "tokenizer with code of its own",
        ("Python code of its own, which is not run", "base.model", "base.trust_remote_code: true"),
        spoil=edit_json(
            "tokenizer_config.json",
            auto_map={"AutoTokenizer": ["own.Tokenizer", None]},
            tokenizer_class="OwnTokenizer",
        ),
    ),
    Case("no tokenizer", ("no usable tokenizer", "base.model", "tokenizer.json"), spoil=no_tokenizer),
    Case(
        "no tokenizer, and a kind of model whose tokenizer is made of nothing",
        ("no usable tokenizer: it has no tokens for text", "base.model", "Put tokenizer.json"),
        spoil=gpt2_without_tokenizer,
    ),
    Case(
        "no end token",
        ("has no end token", "spoilt", "Set eos_token"),
        spoil=edit_json("tokenizer_config.json", eos_token=None),
    ),
    Case(
        "template of roles it lacks",
        ("the chat template refuses", "only lists", "Remove or correct the row"),
        spoil=lambda folder: (folder / "chat_template.jinja").write_text(
            "{{ raise_exception('only lists') if messages|length else '' }}"
        ),
    ),
    Case("no such module", ("no module matches 'x'", "lora.targets", "q_proj"), overrides=("lora.targets=[x]",)),
    Case(
        "one of the modules is none",
        ("no module matches 'v_prj'", "lora.targets", "Did you mean v_proj?"),
        overrides=("lora.targets=[q_proj, v_prj]",),
    ),
    Case(
        "a rank that no matrix has",
        ("rank 100000 is above that of every matrix", "the highest is 32", "lora.rank", "Give at most 32"),
        overrides=("lora.rank=100000",),
    ),
    Case("no such layer", ("no layer 9", "lora.layers", "layers 0 to 1"), overrides=("lora.layers=[9]",)),
    Case(
        "no model configured",
        ("not the configuration of a causal LM", "base.config", "Set model_type"),
        changes={"base": {"config": {"model_type": "xyzzy"}, "random_init": True}},
    ),
    Case(
        "impossible configuration",
        ("not the configuration of a causal LM", "base.config", "Set model_type"),
        changes={"base": {"config": {"model_type": "llama", "hidden_size": "x"}, "random_init": True}},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_one_message_and_nothing_lost(case: Case, refused: Refused) -> None:
    refused(case)


def test_a_hub_that_cannot_be_reached_is_asked_once_and_named(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # a port without a listener
    hub.why_not_asked.cache_clear()
    says = (
        "http://127.0.0.1:9 cannot be reached: [Errno 111]",
        "base.model no/such",
        "Check the name, and the network",
    )
    begun = time.monotonic()
    try:
        refused(Case("no network", says, overrides=("base.model=no/such",)))
    finally:
        hub.why_not_asked.cache_clear()
    assert time.monotonic() - begun < 15, "libraries try for half a minute"


def test_4_bits_without_their_library(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    says = ("4-bit weights need bitsandbytes", "base.quantization", "pip install 'perl-rlhf[4bit]'")
    refused(Case("4-bit without its library", says, overrides=("base.quantization=4bit",)))
