"""Exported models load without PERL and give the outputs of the run's own roles, to 1e-5."""

import json
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer

from perl.commands.export import export
from perl.roles.as_lora import Truncation
from perl.roles.export_formats import merge
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from perl.runs.folder import RunFolder
from perl.stages.conversion import Conversion
from perl.stages.opening import open_run
from perl.stages.pipeline import run
from tests.conftest import RunCli, write_rows
from tests.exported import Run, made_up, make, recipe_on

DIALOGUES = [
    [{"role": "user", "content": "A latte, please."}, {"role": "assistant", "content": "One latte. What size?"}],
    [{"role": "user", "content": "A mocha, please."}, {"role": "assistant", "content": "No."}],
    [
        {"role": "user", "content": "A tea, please."},
        {"role": "assistant", "content": "What size would you like?"},
        {"role": "user", "content": "Large. " * 6},
        {"role": "assistant", "content": "One large tea."},
    ],
]
"""Dialogues of different lengths."""
TEXTS = [("Q: a latte?", " Yes, one latte."), ("Q: tea?", " No."), ("Q: " + "milk, water, " * 5, " Yes.")]
CLASSIFIERS = {False: AutoPeftModelForSequenceClassification, True: AutoModelForSequenceClassification}
LANGUAGE_MODELS = {False: AutoPeftModelForCausalLM, True: AutoModelForCausalLM}


@pytest.fixture(scope="module")
def runs(
    tiny_llama: Path, tiny_gpt2: Path, mixed_data: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Run]:
    """Return runs of all stages: with LoRA; with full tuning on plain text, on a base without a padding token."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [
        {"prompt": prompt.replace("?", f"{number}?"), "chosen": " Yes.", "rejected": f" No {number}."}
        for number in range(4)
        for prompt, _ in TEXTS
    ]
    text = write_rows(folder / "text.jsonl", rows)
    recipes = {
        "full": recipe_on(tiny_llama, mixed_data, tuning="full"),
        "own critic": recipe_on(tiny_llama, mixed_data, rl={"critic": "adapter", "algorithm": "ppo"}),
        "dora": recipe_on(
            tiny_llama,
            mixed_data,
            lora=None,
            adapter={"kind": "dora", "rank": 2, "alpha": 4, "layers": "top-half"},
        ),
        "series": recipe_on(tiny_llama, mixed_data, lora=None, adapter={"kind": "series"}, sft=None, rl=None),
        "bf16": recipe_on(tiny_llama, mixed_data, base={"model": str(tiny_llama), "dtype": "bfloat16"}, rl=None),
        "gpt2": recipe_on(tiny_gpt2, mixed_data, sft=None, rl=None),
        "text": recipe_on(tiny_gpt2, text, sft=None, rl=None, reward={"loss": "pairs"}),
    }
    run(lora := recipe_on(tiny_llama, mixed_data), folder / "lora")
    assert lora.critic == "shared"
    return {"lora": Run(folder / "lora"), **{n: Run(make(folder / n, recipe)) for n, recipe in recipes.items()}}


def classifier(folder: Path, merged: bool) -> tuple[Any, Any]:
    """Load an exported reward model or critic and its tokenizer as its card says."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {} if merged else {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    return CLASSIFIERS[merged].from_pretrained(folder, **options).eval(), tokenizer


def texts_of(dialogues: list[Any], tokenizer: Any) -> list[str]:
    if isinstance(dialogues[0], tuple):
        return ["".join(one) + tokenizer.eos_token for one in dialogues]
    texts: list[str] = tokenizer.apply_chat_template(dialogues, tokenize=False)
    return texts


@torch.no_grad()
def scores(model: Any, tokenizer: Any, dialogues: list[Any], **options: Any) -> Tensor:
    """Score dialogues in the usual way: as padded text in one batch."""
    texts = texts_of(dialogues, tokenizer)
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt", **options)
    found: Tensor = model(**batch).logits[:, 0]
    return found


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert expected.std() > 1e-3  # they are not all equal
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "merged"),
    [("lora", False), ("lora", True), ("full", True), ("gpt2", False), ("gpt2", True), ("text", True)],
)
def test_a_reward_model_scores_as_in_the_run(
    name: str, merged: bool, runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, dialogues = runs[name], TEXTS if name == "text" else DIALOGUES
    export(made.folder, "reward", tmp_path / "out", merged)
    model, tokenizer = classifier(tmp_path / "out", merged)
    expected = made.scores(Role.REWARD, dialogues)
    assert_same(scores(model, tokenizer, dialogues), expected)
    assert_same(torch.cat([scores(model, tokenizer, [one]) for one in dialogues]), expected)
    if name in ("lora", "full"):  # GPT-2 counts positions over padding on the left
        assert_same(scores(model, tokenizer, dialogues, padding_side="left"), expected)
    plain = name == "text"
    assert [tokenizer(text, add_special_tokens=plain).input_ids for text in texts_of(dialogues, tokenizer)] == [
        made.ids(one) for one in dialogues
    ]
    variables = card_code(tmp_path / "out", monkeypatch)
    said = (("A prompt", " and its answer."),) if plain else variables["dialogues"]
    torch.testing.assert_close(variables["scores"], made.scores(Role.REWARD, list(said)), rtol=0, atol=1e-5)


def card_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a card's Python code in its folder and return its variables."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    variables: dict[str, Any] = {}
    exec(code, variables)
    return variables


@pytest.mark.parametrize("name", ["lora", "text"])
def test_a_pipeline_gives_the_score_or_what_the_card_says(name: str, runs: dict[str, Run], tmp_path: Path) -> None:
    made, dialogues = runs[name], TEXTS if name == "text" else DIALOGUES
    export(made.folder, "reward", tmp_path / "out", True)
    pipe = pipeline("text-classification", str(tmp_path / "out"), device="cpu")
    texts, expected = texts_of(dialogues, pipe.tokenizer), made.scores(Role.REWARD, dialogues)

    def given(**options: Any) -> Tensor:
        return torch.tensor([one["score"] for one in pipe(texts, add_special_tokens=False, **options)])

    assert_same(given(function_to_apply="none"), expected)
    assert_same(given(function_to_apply="none", batch_size=3), expected)
    # The probability for thumbs, the score for pairs: see the card.
    assert_same(given(), expected if name == "text" else expected.sigmoid())
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("returns the score;" if name == "text" else "returns σ(score)") in card


@pytest.mark.parametrize(("name", "merged"), [("lora", False), ("lora", True), ("full", False)])
@pytest.mark.parametrize("role", [Role.SFT, Role.POLICY])
def test_a_language_model_says_what_it_said_in_the_run(
    role: Role, name: str, merged: bool, runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, folder = runs[name], tmp_path / "out"
    export(made.folder, role, folder, merged)
    whole = not (folder / "adapter_config.json").exists()
    assert whole == (merged or name == "full")
    model = LANGUAGE_MODELS[whole].from_pretrained(folder).eval()
    ids = made.ids(DIALOGUES[2])
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    found = log_probs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert_same(found, made.log_probs(role, ids))
    assert (found - made.log_probs(Role.BASE, ids)).abs().max() > 1e-3
    variables = card_code(folder, monkeypatch)
    settings, tokenizer = variables["settings"], variables["tokenizer"]
    assert settings.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert (settings.do_sample, settings.top_k) == ((True, 0) if role is Role.POLICY else (None, None))
    assert variables["prompt"]["input_ids"].shape[1] < variables["ids"].shape[1] <= 256


@pytest.mark.parametrize("name", ["lora", "full", "own critic"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_critic_comes_with_the_trunk_that_it_reads(
    name: str, merged: bool, runs: dict[str, Run], tmp_path: Path
) -> None:
    made = runs[name]
    export(made.folder, "critic", tmp_path / "out", merged)
    model, tokenizer = classifier(tmp_path / "out", merged or name == "full")
    trunk = Role.CRITIC if name == "own critic" else Role.POLICY
    assert_same(scores(model, tokenizer, DIALOGUES), made.scores(Role.CRITIC, DIALOGUES, trunk))


def test_merging_leaves_the_shared_base_alone_and_rounds_once(runs: dict[str, Run]) -> None:
    session = runs["lora"].session
    roles = session.roles
    assert isinstance(roles, SharedBase)
    session.load(Role.POLICY)
    fresh = session.base.load()
    before = {name: weight.clone() for name, weight in fresh.state_dict().items()}
    merged = merge(fresh, roles, Role.POLICY).state_dict()
    assert roles.base_sha256() == session.base.sha256
    half = merge(session.base.load().bfloat16(), roles, Role.POLICY).state_dict()
    changed = 0
    for name, weight in before.items():
        delta = torch.zeros_like(weight)
        if (pair := f"{name.removesuffix('.weight')}.lora_A.weight") in roles.weights(Role.POLICY):
            a, b = (roles.weights(Role.POLICY)[pair.replace("_A", x)].detach() for x in ("_A", "_B"))
            delta = 4 / 2 * b @ a  # alpha over rank
            changed += int(delta.abs().max() > 0)
        torch.testing.assert_close(merged[name], weight + delta, rtol=0, atol=1e-7)
        exact = weight.bfloat16().float() + delta
        assert half[name].dtype == torch.bfloat16
        torch.testing.assert_close(half[name].float(), exact, rtol=2**-8, atol=1e-7)
    assert changed == 14


def test_a_base_in_bf16_stays_in_bf16_and_what_rounding_costs_is_said(
    runs: dict[str, Run], run_cli: RunCli, tmp_path: Path
) -> None:
    made = runs["bf16"]
    code, said = run_cli("export", made.folder, "reward", tmp_path / "out", "--merge")
    assert code == 0, said
    (cost,) = (float(number) for number in re.findall(r"by at most ([\d.e-]+) on rows of up to 64 tokens", said))
    assert f"at most {cost:.1g}" in (tmp_path / "out" / "README.md").read_text()
    model, tokenizer = classifier(tmp_path / "out", True)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    expected = made.scores(Role.REWARD, DIALOGUES)
    assert 0 < cost < 0.05 * expected.abs().max()
    assert (scores(model, tokenizer, DIALOGUES) - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_folder_needs_nothing_of_the_run(runs: dict[str, Run], tmp_path: Path) -> None:
    made, out = runs["lora"], tmp_path / "out"
    export(made.folder, "reward", out, False)
    names = {file.name for file in out.iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "perl.json",
        "README.md",
    } <= names
    assert {file.stat().st_mode & 0o444 for file in out.iterdir()} == {0o444}
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == made.session.base.name
    assert config["task_type"] == "SEQ_CLS"
    assert (out / "perl.json").read_bytes() == (made.session.saved(Role.REWARD) / "perl.json").read_bytes()
    result = made.session.folder.result("reward")
    assert result is not None
    card = (out / "README.md").read_text()
    stamp = made.session.stamp(Role.REWARD)
    for said in (
        f"| auroc | {result.eval.auroc:.4g} |",
        "tiny-llama",
        "mixed.jsonl",
        made.session.base.sha256,
        f"(σ(score) - {stamp.reward_mean:.6g}) / {stamp.reward_std:.6g}",
    ):
        assert said in card
    assert str(tmp_path) not in card
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.pad_token == "<|pad|>"
    context = tokenizer.apply_chat_template(DIALOGUES[0][:1], tokenize=False, add_generation_prompt=True)
    assert context == "<|im_start|>user\nA latte, please.<|im_end|>\n<|im_start|>assistant\n"


# TRL.


def trainer_settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **more,
    }


@pytest.mark.parametrize(("trainer_class", "config_class"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_trl_trains_a_policy_against_the_exported_reward_model(
    trainer_class: Any, config_class: Any, runs: dict[str, Run], tiny_llama: Path, tmp_path: Path
) -> None:
    made = runs["lora"]
    export(made.folder, "reward", tmp_path / "reward", True)
    seen: list[list[dict[str, str]]] = []

    def witness(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        seen.extend(prompt + completion for prompt, completion in zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    trainer = trainer_class(
        model=str(tiny_llama),
        reward_funcs=[str(tmp_path / "reward"), witness],
        args=config_class(
            **trainer_settings(tmp_path / "trl", per_device_train_batch_size=4, learning_rate=1e-3),
            num_generations=2,
            max_completion_length=12,
        ),
        train_dataset=Dataset.from_list([{"prompt": one[:-1]} for one in DIALOGUES] * 2),
    )
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())
    assert len(seen) == 4
    expected = made.scores(Role.REWARD, seen)
    logged = next(line for line in trainer.state.log_history if "rewards/reward/mean" in line)
    assert expected.std() > 1e-3
    assert logged["rewards/reward/mean"] == pytest.approx(float(expected.mean()), abs=1e-5)
    assert logged["rewards/reward/std"] == pytest.approx(float(expected.std()), abs=1e-5)


def test_trls_reward_trainer_goes_on_from_the_exported_reward_model(runs: dict[str, Run], tmp_path: Path) -> None:
    made = runs["lora"]
    export(made.folder, "reward", tmp_path / "reward", True)
    pair = {"prompt": DIALOGUES[0][:1], "chosen": DIALOGUES[0][1:], "rejected": DIALOGUES[1][1:]}
    trainer = RewardTrainer(
        model=str(tmp_path / "reward"),
        args=RewardConfig(**trainer_settings(tmp_path / "trl", per_device_train_batch_size=1, learning_rate=1e-3)),
        train_dataset=Dataset.from_list([pair]),
    )
    trainer.train()
    better, worse = made.scores(Role.REWARD, [DIALOGUES[0], [*DIALOGUES[0][:1], *DIALOGUES[1][1:]]]).tolist()
    logged = next(line for line in trainer.state.log_history if "mean_reward" in line)
    assert logged["mean_reward"] == pytest.approx((better + worse) / 2, abs=1e-5)
    assert logged["margin"] == pytest.approx(better - worse, abs=1e-5)
    assert float(scores(trainer.model, trainer.processing_class, DIALOGUES[:1])) != pytest.approx(better, abs=1e-4)


# What is refused.


def test_what_cannot_be_exported_is_said_in_one_message(
    runs: dict[str, Run], run_cli: RunCli, tiny_llama: Path, mixed_data: Path, tmp_path: Path
) -> None:
    def refused(*arguments: object) -> str:
        code, text = run_cli("export", *arguments)
        assert code == 2, text
        assert "Traceback" not in text
        return " ".join(text.split())

    lora, out = runs["lora"].folder, tmp_path / "out"
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    assert "no role 'judge' to export" in refused(lora, "judge", out)
    assert "is not empty" in refused(lora, "reward", tmp_path / "used")
    assert "is a file" in refused(lora, "reward", tmp_path / "used" / "file")
    assert (tmp_path / "used" / "file").read_text() == "mine"
    assert "not a run folder" in refused(tmp_path, "reward", out)
    assert "the run has no policy" in refused(runs["gpt2"].folder, "policy", out)
    four_bit = recipe_on(tiny_llama, mixed_data, base={"model": "some/model", "quantization": "4bit"})
    with RunFolder(tmp_path / "run").claim(four_bit):
        (tmp_path / "run" / "sft").mkdir()
        RunFolder(tmp_path / "run").finish("sft", made_up("sft"))
    assert "trained on 4-bit weights" in refused(tmp_path / "run", "sft", out, "--merge")
    assert not out.exists()


def test_an_adapter_on_a_base_that_a_classifier_cannot_load_completely_is_refused(
    tiny_llama: Path, mixed_data: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    """Its files store tied embeddings only as the language model's head; the merged model includes them."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    out = make(tmp_path / "run", recipe_on(base, mixed_data, rl=None))
    code, written = run_cli("export", out, "reward", tmp_path / "adapter")
    assert code == 2
    assert "lack model.embed_tokens.weight" in " ".join(written.split())
    assert not (tmp_path / "adapter").exists()
    code, written = run_cli("export", out, "reward", tmp_path / "whole", "--merge")
    assert code == 0, written
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    assert_same(scores(model, tokenizer, DIALOGUES), Run(out).scores(Role.REWARD, DIALOGUES))


def test_an_unfinished_stage_and_a_missing_critic_are_refused(
    tiny_llama: Path, mixed_data: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    rloo = {"algorithm": "rloo", "samples_per_prompt": 2, "steps": 1, "prompts_per_step": 1, "max_new_tokens": 2}
    rl = {**rloo, "eval_prompts": 1, "reward": {"function": f"{tmp_path}/rewards.py:one"}}
    (tmp_path / "rewards.py").write_text(
        "def one(completions, **columns):\n    return [1.0 for _ in completions]\n"
    )
    config = {"model": str(tiny_llama), "dtype": "float32", "random_init": True}
    folder = make(tmp_path / "run", recipe_on(tiny_llama, mixed_data, base=config, sft=None, reward=None, rl=rl))
    code, text = run_cli("export", folder, "critic", tmp_path / "out")
    assert code == 2
    assert "the run has no critic: rloo needs none" in text
    code, text = run_cli("export", folder, "policy", tmp_path / "out")
    assert code == 2
    assert "initialized at random" in " ".join(text.split())
    (tmp_path / "out").mkdir()  # empty folders are like new ones
    code, text = run_cli("export", folder, "policy", tmp_path / "out", "--merge")
    assert code == 0, text
    assert (tmp_path / "out" / "model.safetensors").exists()
    (folder / "policy" / "result.json").unlink()
    code, text = run_cli("export", folder, "policy", tmp_path / "other", "--merge")
    assert code == 2
    assert "rl is not finished" in text


def test_without_a_connection_what_would_be_uploaded_is_listed(
    runs: dict[str, Run], run_cli: RunCli, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, text = run_cli("export", runs["gpt2"].folder, "reward", out, "--push-to-hub", "no/name/of/the/hub")
    assert code == 2
    assert "--push-to-hub" in text
    assert not out.exists()
    code, text = run_cli("export", runs["gpt2"].folder, "reward", out, "--push-to-hub", "somebody/judge")
    assert code == 0, text
    assert "Nothing was uploaded to somebody/judge: HF_HUB_OFFLINE is set" in text
    assert all(f"  {file.name}  " in text for file in out.iterdir())
    assert f"hf upload somebody/judge {out}" in text


def test_without_room_nothing_is_left(runs: dict[str, Run], run_cli: RunCli, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))
    try:
        code, text = run_cli("export", runs["lora"].folder, "reward", tmp_path / "out", "--merge")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1, text
    assert "Traceback" not in text
    assert not any(tmp_path.iterdir())


def test_rows_that_the_run_cuts_are_not_compared(
    tiny_llama: Path, mixed_data: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    """Only the run cuts them, so a small difference on whole rows would say nothing about its scores."""
    recipe = recipe_on(tiny_llama, mixed_data, sft=None, rl=None, reward={"max_length": 8})
    code, said = run_cli("export", make(tmp_path / "run", recipe), "reward", tmp_path / "out", "--merge")
    assert code == 0, said
    assert "differ from the run's" not in said
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The run drops the oldest turns of rows of more than 8 tokens" in card
    assert "differ from the run's" not in card


def test_the_card_names_the_bases_context_where_it_is_what_limits_rows(
    tiny_llama: Path, mixed_data: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    recipe = recipe_on(tiny_llama, mixed_data, sft=None, rl=None, reward={"max_length": 100_000})
    code, said = run_cli("export", folder := make(tmp_path / "run", recipe), "reward", tmp_path / "out", "--merge")
    assert code == 0, said
    context = open_run(folder).base.context_length
    assert f"on rows of up to {context} tokens" in said
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"rows of more than {context} tokens (the base's context)" in card
    assert f"held-out rows of up to {context} tokens differ" in card


@torch.no_grad()
def test_an_adapter_is_written_as_lora_with_what_that_costs(
    runs: dict[str, Run], run_cli: RunCli, tmp_path: Path
) -> None:
    made, out = runs["dora"], tmp_path / "rewards"
    code, text = run_cli("export", made.folder, "reward", out, "--as-lora", 3)
    assert code == 0, text
    assert json.loads((out / "adapter_config.json").read_text())["use_dora"] is False
    said = re.search(r"error of the change to the weights is (\S+); the scores of (\d+) held-out rows", text)
    assert said is not None
    assert float(said[1]) > 0.01
    assert "rescales whole rows" in text
    assert "A relative error of 0.01 needs rank" in text
    model, tokenizer = classifier(out, False)
    rated = [(one.context, one.answer) for one in made.session.held_out.ratings]
    names = {"user": "user", "agent": "assistant"}
    rows = [
        [{"role": names[t.speaker], "content": t.text} for t in (*context, answer)] for context, answer in rated
    ]
    difference = scores(model, tokenizer, rows) - made.scores(Role.REWARD, rows)
    rms = re.search(r"differ by (\S+) \(RMS\)", text)
    assert rms is not None
    assert len(rows) == int(said[2])
    assert float(rms[1]) == pytest.approx(float(difference.square().mean().sqrt()), rel=0.05)
    assert "written as LoRA" in (out / "README.md").read_text()


@pytest.mark.parametrize(("most", "above"), [(83, False), (48, True)])
def test_no_rank_is_advised_that_the_command_refuses(most: int, above: bool) -> None:
    truncation = Truncation(rank=24, error=0.3, enough=83, most=most, biases=False)
    advice = Conversion("adapters of kind ia3", truncation, rescales=False, rows=8).advice
    assert advice.startswith("A relative error of 0.01 needs rank 83")
    assert ("more than a layer's 48: --merge loses nothing" in advice) == above


def test_the_kl_to_a_policy_as_lora_is_measured(runs: dict[str, Run], run_cli: RunCli, tmp_path: Path) -> None:
    kl = {}
    for rank in (1, 32):
        code, text = run_cli("export", runs["dora"].folder, "policy", tmp_path / str(rank), "--as-lora", rank)
        assert code == 0, text
        found = re.search(r"completions of held-out prompts the KL is (\S+) nats", text)
        assert found is not None
        kl[rank] = float(found[1])
    assert kl[1] > 1e-4 > abs(kl[32])
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "32")
    ids = runs["dora"].ids(DIALOGUES[0])
    log_probs = model(torch.tensor([ids])).logits.log_softmax(-1)[0, :-1]
    expected = runs["dora"].log_probs(Role.POLICY, ids)
    torch.testing.assert_close(log_probs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0], expected)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("dora", ("--as-lora", 4, "--merge"), "--as-lora: a whole model has no adapter"),
        ("full", ("--as-lora", 4), "full tuning, which has no adapter"),
        ("series", ("--as-lora", 4), "they do not amount to a change of weights"),
    ],
)
def test_what_cannot_be_written_as_lora_is_refused(
    name: str, options: tuple[object, ...], says: str, runs: dict[str, Run], run_cli: RunCli, tmp_path: Path
) -> None:
    code, text = run_cli("export", runs[name].folder, "reward", tmp_path / "out", *options)
    assert code == 2
    assert says in " ".join(text.split())
    assert not (tmp_path / "out").exists()
