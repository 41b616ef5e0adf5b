"""Fixtures of all tests: tiny models, small files of every kind of record, and the command line in-process.

torch and libraries based on it are imported where they are used, because the process that distributes tests does
not need them.
"""

import contextlib
import gc
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: no test may use the network
os.environ["OMP_NUM_THREADS"] = "1"  # read at import: tests run in parallel
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # nothing compiles; else bitsandbytes imports the compiler for a second

import pytest
import yaml

from tests.blank import Blank, drawn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["A latte, please.", "What size would you like?", "Large.", "User: hello", "Agent: yes, no, thank you"]
LEAVES = """
import os, signal
calls = 0

def leaves(completions, **columns):
    global calls
    calls += 1
    if calls == int(os.environ.get("LEAVE_AT", 0)):
        os.kill(os.getpid(), signal.SIGTERM)
    return [float(len(str(text))) for text in completions]
"""
"""A reward function that sends its own run a stop signal, at the call whose number is in the environment."""
DRINKS = ["latte", "mocha", "espresso", "cappuccino", "tea", "juice", "water", "cocoa", "cider", "milk"]

RunCli = Callable[..., tuple[int, str]]
WriteRecipe = Callable[..., Path]


def make_tokenizer(special: list[str], template: str | None, **tokens: str) -> "PreTrainedTokenizerFast":
    """Return a byte-level BPE of 300 tokens, including the special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **tokens)


def pytest_collection_finish() -> None:
    """Hide all imported objects from the garbage collector before the first test, and prepare to fork.

    A measured stage collects several times, and would traverse the objects of all modules each time.
    """
    import hypothesis  # noqa: F401  it looks for modules' references when it is imported, before they are frozen

    gc.collect()
    gc.freeze()
    if "tests.forks" in sys.modules:
        sys.modules["tests.forks"].begin()
        if "perl.predict" in sys.modules:  # for `estimate`
            sys.modules["tests.forks"].begin_forkserver()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need a GPU where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU with CUDA")


@pytest.fixture(scope="session", autouse=True)
def _blank_plots() -> Iterator[None]:
    """Do not draw the page's plots in tests of other things, because that takes most of a page's time."""
    with mock.patch("perl.report.svg.Figure", Blank):
        yield


@pytest.fixture
def drawn_plots() -> Iterator[None]:
    """Draw real plots."""
    with drawn():
        yield


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """Hide objects of earlier test files, such as late imports, from the garbage collector too."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _unflushed() -> Iterator[None]:
    """Skip fsync: no test's file has to survive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give each test session its own caches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def own_registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start without plugins, as a new process does, and remove afterwards what the test's plugins add."""
    from perl import plugins

    monkeypatch.setattr(plugins, "_loaded", {})
    registries = [getattr(import_module(module), name) for name, module in plugins.REGISTRIES.items()]
    before = [dict(registry) for registry in registries]
    yield
    for registry, rows in zip(registries, before, strict=True):
        registry.clear()
        registry.update(rows)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random Llama (context 256), its tokenizer and a ChatML template."""
    import torch

    from tests.tiny import random_llama

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    special = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = make_tokenizer(special, CHATML, pad_token="<|pad|>", eos_token="<|im_end|>")
    with torch.random.fork_rng():
        random_llama(
            vocab_size=len(tokenizer),
            initializer_range=0.02,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random GPT-2 (context 256) and a tokenizer without chat template or padding."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    tokenizer = make_tokenizer(["<|endoftext|>"], None, eos_token="<|endoftext|>")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        end = tokenizer.eos_token_id
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=256,
            bos_token_id=end,
            eos_token_id=end,
        )
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(file: Path, rows: list[Any]) -> Path:
    """Write rows as a JSON Lines file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with demonstrations, ratings, pairs and prompts of ten dialogues, as JSON Lines."""
    folder = tmp_path_factory.mktemp("data")
    asked = [[{"role": "user", "content": f"A {drink}, please."}] for drink in DRINKS]
    good = [f"One {drink}. What size?" for drink in DRINKS]
    write_rows(
        folder / "demonstrations.jsonl",
        [{"prompt": prompt, "completion": answer} for prompt, answer in zip(asked, good, strict=True)],
    )
    write_rows(
        folder / "ratings.jsonl",
        [
            {"prompt": prompt, "completion": text, "label": label}
            for prompt, answer in zip(asked, good, strict=True)
            for text, label in ((answer, True), ("No.", False))
        ],
    )
    write_rows(
        folder / "pairs.jsonl",
        [
            {"prompt": prompt, "chosen": answer, "rejected": "No."}
            for prompt, answer in zip(asked, good, strict=True)
        ],
    )
    write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in asked])
    return folder


@pytest.fixture(scope="session")
def mixed_data(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one file with demonstrations and ratings."""
    file = tmp_path_factory.mktemp("mixed") / "mixed.jsonl"
    names = ("demonstrations.jsonl", "ratings.jsonl")
    file.write_text("".join((small_data / name).read_text() for name in names))
    return file


BRIEF = {"anyway": True, "eval_samples": 16, "best_of_n": 0}
"""Keys of `rl`: a reward model trained on few ratings is not good enough, and the default is 768 completions."""


def recipe_file(folder: Path, model: Path, data: Path, /, **changes: Any) -> Path:
    """Write a recipe that runs in a second; `changes` replace its keys, and None removes them."""
    (folder / "rewards.py").write_text(
        "def length(completions, **columns):\n    return [float(len(str(text))) for text in completions]\n"
    )
    recipe: dict[str, Any] = {
        "name": "tiny",
        "base": {"model": str(model), "dtype": "float32"},
        "lora": {"rank": 2, "alpha": 4},
        "data": {"source": "jsonl", "path": str(data / "ratings.jsonl"), "held_out": 0.3},
        "reward": {"loss": "thumbs", "epochs": 1, "batch_size": 4, "max_length": 64},
        "rl": {
            "reward": {"function": "rewards.py:length"},
            "steps": 1,
            "prompts_per_step": 2,
            "max_new_tokens": 4,
            "eval_prompts": 2,
        },
        **changes,
    }
    recipe = {key: value for key, value in recipe.items() if value is not None}
    if isinstance(recipe.get("rl"), dict):
        recipe["rl"] = {**BRIEF, **recipe["rl"]}
        if recipe["rl"]["eval_samples"] is None:  # the default
            del recipe["rl"]["eval_samples"]
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_llama: Path, small_data: Path) -> WriteRecipe:
    """Return `recipe_file` for this test's folder, model and data."""
    return partial(recipe_file, tmp_path, tiny_llama, small_data)


def command(*arguments: object) -> tuple[int, str]:
    """Run `perl-rlhf ARGUMENTS` in this process; return its exit status and its output (stdout and stderr)."""
    from perl import cli

    found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    written, status = io.StringIO(), 0
    try:
        with (
            mock.patch.object(sys, "argv", ["perl-rlhf", *map(str, arguments)]),
            contextlib.redirect_stdout(written),
            contextlib.redirect_stderr(written),
        ):
            cli.main()
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)
    return status, written.getvalue()


@pytest.fixture
def run_cli() -> RunCli:
    """Return `command`."""
    return command
