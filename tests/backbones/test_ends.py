"""End tokens of an answer: those of the template, the tokenizer and the generation configuration."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from perl.backbones.chat import ChatFormat
from perl.backbones.loading import load_base, random_base
from perl.commands.export import export
from perl.data.records import Turn
from tests.backbones.test_chat import chatml, llama_3, plain
from tests.exported import make, recipe_on

CPU = torch.device("cpu")
ASKED = [Turn("user", "A latte, please.")]
TEXT = [Turn("text", "Once")]


def configured(model: Path, folder: Path, **settings: Any) -> Path:
    """Return a copy of a model with these generation settings."""
    shutil.copytree(model, folder)
    GenerationConfig(**settings).save_pretrained(folder)
    return folder


def test_a_models_other_end_ends_answers_too(tiny_llama: Path, tmp_path: Path) -> None:
    """The template has one end token, the generation configuration another."""
    names = ["<|im_end|>", "<|endoftext|>"]
    tokenizer = load_base(str(tiny_llama), torch.float32, CPU)[0].tokenizer
    end, other = tokenizer.convert_tokens_to_ids(names)
    base, _ = load_base(str(configured(tiny_llama, tmp_path / "a", eos_token_id=other)), torch.float32, CPU)
    assert base.chat.ends(ASKED) == (end, other)
    assert base.chat.ends(TEXT) == (end, other), "the tokenizer's is <|im_end|> too"
    assert base.chat.completion(ASKED, Turn("agent", "yes"))[-1] == end == base.chat.end_id
    assert base.chat.decode([*base.chat.completion(ASKED, Turn("agent", "yes"))[:-1], other]) == "yes"


@pytest.mark.parametrize("listed", [[2, 3, 4], [4, 3, 2, 3]])
def test_what_is_exported_ends_where_the_model_did(
    listed: list[int], tiny_llama: Path, mixed_data: Path, tmp_path: Path
) -> None:
    model = configured(tiny_llama, tmp_path / "model", eos_token_id=listed)
    folder = make(
        tmp_path / "run",
        recipe_on(
            model, mixed_data, sft=None, reward=None, rl={"reward": {"function": f"{reward(tmp_path)}:one"}}
        ),
    )
    for merged in (False, True):
        export(folder, "policy", out := tmp_path / f"out-{merged}", merged)
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 3, 4]
    card = (out / "README.md").read_text()
    assert "A completion ends with `<|im_end|>` or `<|im_start|>` or `!`" in card


def reward(folder: Path) -> Path:
    (folder / "rewards.py").write_text("def one(completions, **columns):\n    return [1.0] * len(completions)\n")
    return folder / "rewards.py"


@pytest.mark.parametrize("settings", [{"eos_token_id": [1, 299, 300, 10_000, -1]}, {"eos_token_id": 1}])
def test_what_is_not_in_the_vocabulary_ends_nothing(settings: Any, tiny_llama: Path, tmp_path: Path) -> None:
    base, _ = load_base(str(configured(tiny_llama, tmp_path / "a", **settings)), torch.float32, CPU)
    assert set(base.chat.ends(ASKED)) <= {1, 3, 299}
    assert {1, 3} <= set(base.chat.ends(ASKED))


def test_the_default_of_an_architecture_is_no_end(tiny_llama: Path, tmp_path: Path) -> None:
    """Llama's configuration has 2 as its default, which is a letter in this vocabulary."""
    base, lm = random_base(
        {
            "model_type": "llama",
            "vocab_size": 300,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        torch.float32,
        CPU,
        0,
    )
    assert lm.generation_config is not None
    assert lm.generation_config.eos_token_id == 2
    assert base.chat.ends(ASKED) == (base.tokenizer.eos_token_id,) == (1,)
    folder = shutil.copytree(tiny_llama, tmp_path / "a")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    for ends, expected in ((20, (3,)), ([1, 20], (3, 1))):
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
        assert load_base(str(folder), torch.float32, CPU)[0].chat.ends(ASKED) == expected


def test_what_a_template_writes_inside_an_answer_does_not_end_it() -> None:
    """gpt-oss writes an answer's channel in this way."""
    tokenizer = llama_3()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|mid|>\n\n{{", "<|mid|>\n\n<|end|>{{")
    tokenizer.eos_token = "<|eot|>"
    end, mid, start = tokenizer.convert_tokens_to_ids(["<|end|>", "<|mid|>", "<|start|>"])
    chat = ChatFormat(tokenizer, [end, mid, start])
    assert end in chat.completion(ASKED, Turn("agent", "yes"))
    assert chat.ends(ASKED) == (chat.end_id, *sorted([mid, start]))


def test_a_format_with_other_ends_is_another_format() -> None:
    assert len({ChatFormat(chatml(), ends).sha256 for ends in ((), (0,), (0, 20), (20, 0))}) == 3
    assert ChatFormat(chatml(), [1]).sha256 == ChatFormat(chatml()).sha256, "the tokenizer's own"


def test_padding_may_be_an_end_that_no_row_is_written_with() -> None:
    chat = ChatFormat(chatml(), [0])
    assert chat.pad_id == 0
    assert 0 in chat.end_ids
    assert ChatFormat(plain(), [5]).ends(TEXT) == (0, 5)
