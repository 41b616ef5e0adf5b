"""Preflight: all checks pass on trained roles, and each fails on its own sabotage and names the cause."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import perl.rl.rewards.model
from perl.backbones import Decoder
from perl.recipe import load_recipe
from perl.results import Check
from perl.rl.batches import trim
from perl.rl.checks.findings import PreflightError
from perl.rl.checks.preflight import COMPLETIONS, Preflight
from perl.rl.collector import Collector
from perl.rl.rewards.model import RewardModel
from perl.rl.rollout import EncodedPrompts
from perl.rl.samplers.base import Samples
from perl.rl.samplers.local import LocalSampler
from perl.roles.fingerprint import fingerprint
from perl.roles.outputs import Outputs
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from perl.stages.opening import open_session
from perl.stages.pipeline import TRAIN
from perl.stages.rl_preflight import earlier_stages
from perl.stages.rl_setup import setup_collector, tokenized_prompts
from perl.stages.session import Session
from tests.conftest import RunCli, WriteRecipe

FUNCTION = {"reward": {"function": "rewards.py:length"}}
RL = {
    "steps": 2,
    "prompts_per_step": 8,
    "max_new_tokens": 12,
    "eval_prompts": 2,
    "temperature": 0.8,
    "anyway": True,
}
CHECKED_ALWAYS = [
    "read at the end",
    "sampled as read",
    "temperature",
    "begins as the reference",
    "dropout off",
    "adapter in the forward pass",
    "adapter in the sampler",
    "roles apart",
    "sampler follows the policy",
]
HEAD = "base_model.model.score.weight"


@dataclasses.dataclass
class Parts:
    """Inputs of preflight, before RL, which tests spoil."""

    session: Session
    collector: Collector
    prompts: EncodedPrompts

    def check(self) -> list[Check]:
        stages = earlier_stages(self.session, self.collector.reward)
        return Preflight(self.collector, self.prompts, "out", stages).check()

    def ends_with(self, *ids: int) -> None:
        sampling = dataclasses.replace(self.collector.sampling, end_ids=ids)
        self.collector = dataclasses.replace(self.collector, sampling=sampling)

    def fails(self, check: str) -> str:
        """Return the message of a preflight whose first failure is this check."""
        with pytest.raises(PreflightError) as caught:
            self.check()
        assert caught.value.status == 1
        shown = {"recorded": "recorded values", "sampled": "forward pass", "end": "last token", "KL": "KL of"}
        assert shown.get(check, check) in caught.value.what.split(".")[0]
        return caught.value.remedy


def recipe(file: Path, base: Path, data: Path, **changes: Any) -> Path:
    """Write a recipe of all stages, with learning rates that move reward and policy far from zero."""
    content = {
        "name": "checked",
        "base": {"model": str(base), "dtype": "float32"},
        "lora": {"rank": 2, "alpha": 4},
        "data": {"source": "jsonl", "path": str(data), "held_out": 0.3},
        "sft": {"epochs": 2, "batch_size": 4, "learning_rate": 0.01},
        "reward": {"loss": "thumbs", "epochs": 4, "batch_size": 4, "learning_rate": 0.01},
        "rl": RL,
        **changes,
    }
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def ready(session: Session) -> Parts:
    """Prepare a session for RL: load trained roles and make the policy a copy of the reference."""
    if session.recipe.sft is not None:
        session.load(Role.SFT)
    collector = setup_collector(session)
    session.roles.add(Role.POLICY, copy_of=session.roles.reference)
    prompts = tokenized_prompts(session, session.train.prompts)
    return Parts(session, collector, prompts.take(range(min(COMPLETIONS, len(prompts)))))


@pytest.fixture(scope="module")
def trained_once(tiny_llama: Path, mixed_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder with finished SFT and reward stages."""
    folder = tmp_path_factory.mktemp("trained")
    loaded = load_recipe(recipe(folder / "recipe.yaml", tiny_llama, mixed_data))
    session = open_session(loaded, folder / "out")
    with session.folder.claim(loaded):
        for stage in ("sft", "reward"):
            session.folder.finish(stage, TRAIN[stage](session))
    return folder / "out"


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    """Return a copy that the test may spoil."""
    return shutil.copytree(trained_once, tmp_path / "out")


@pytest.fixture
def parts(trained: Path) -> Parts:
    return ready(open_session(load_recipe(trained / "recipe.yaml"), trained))


def test_all_checks_pass_on_what_was_trained(parts: Parts) -> None:
    found = parts.check()
    assert [finding.name for finding in found] == [
        "base unchanged",
        "sft reloaded",
        "reward reloaded",
        "tokens as recorded",
        "recorded evaluation",
        *CHECKED_ALWAYS,
    ]
    assert all(finding.figure <= 1e-4 for finding in found)
    recorded = json.loads((parts.session.saved(Role.REWARD).parent / "result.json").read_text())["recorded"]
    assert len({row["score"] for row in recorded}) > 2  # otherwise equal scores would prove nothing


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_they_pass_in_a_run_whose_roles_are_still_in_memory(
    tuning: str, tiny_llama: Path, mixed_data: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    file = recipe(tmp_path / "recipe.yaml", tiny_llama, mixed_data, tuning=tuning)
    code, text = run_cli("run", file, "--out", tmp_path / "out")
    assert code == 0, text
    checks = 15 if tuning == "lora" else 12  # the adapters in two, and a shared critic's values
    assert text.count("✓ Preflight") == checks
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = report["stages"]["rl"]["preflight"]
    assert [finding["figure"] <= finding["limit"] for finding in found] == [True] * checks
    assert report["stages"]["rl"]["incidents"] == []


def test_with_a_reward_function_there_is_less_to_check(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    session = open_session(load_recipe(write_recipe(reward=None)), tmp_path / "out")
    found = [finding.name for finding in ready(session).check()]
    assert found == ["base unchanged", *CHECKED_ALWAYS]


# Sabotage.


@torch.no_grad()
def noise(parts: Parts, role: Role) -> None:
    for weight in parts.session.roles.weights(role).values():
        weight.add_(0.1 * torch.randn_like(weight))


def test_a_policy_that_is_no_copy_of_its_reference(parts: Parts) -> None:
    noise(parts, Role.POLICY)
    assert "did not start as a copy of sft" in parts.fails("KL")


def test_a_policy_computed_unlike_its_reference(parts: Parts) -> None:
    def unlike(module: Any, arguments: tuple[Any, ...], outputs: Outputs) -> Outputs:
        if arguments[0] is not Role.SFT or outputs.log_probs_BT is None:
            return outputs
        return outputs._replace(log_probs_BT=1.1 * outputs.log_probs_BT)

    parts.session.roles.register_forward_hook(unlike)
    assert "the weights are equal, but the passes differ" in parts.fails("KL")


@pytest.mark.parametrize("role", [Role.SFT, Role.REWARD])
def test_an_adapter_in_memory_that_is_not_the_one_on_disk(role: Role, parts: Parts) -> None:
    noise(parts, role)
    assert "another adapter was written to this folder" in parts.fails(f"{role} adapter read from disk")


def test_a_head_in_memory_that_is_not_the_one_on_disk(parts: Parts) -> None:
    with torch.no_grad():
        parts.session.roles.head(Role.REWARD).weight.mul_(1.5)
    assert "head was lost on saving" in parts.fails("reward adapter read from disk")


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda head: head.flip(1).contiguous(), "an adapter of another base or another run"),
        (torch.zeros_like, "all scores are equal: the head was lost on saving"),
    ],
)
def test_a_head_on_disk_that_is_not_the_one_evaluated(
    spoil: Callable[[Tensor], Tensor], cause: str, trained: Path
) -> None:
    file = trained / "reward" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {HEAD: spoil(tensors[HEAD])}, file, {"format": "pt"})
    parts = ready(open_session(load_recipe(trained / "recipe.yaml"), trained))
    assert cause in parts.fails("recorded")


def test_held_out_rows_that_are_others_than_they_were(parts: Parts) -> None:
    ratings = parts.session.held_out.ratings
    parts.session.held_out = dataclasses.replace(parts.session.held_out, ratings=ratings[::-1])
    assert "the data have changed" in parts.fails("tokens")
    parts.session.held_out = dataclasses.replace(parts.session.held_out, ratings=ratings[:2])
    assert "the data have changed" in parts.fails("tokens")


def test_a_sampler_at_another_temperature(parts: Parts) -> None:
    class Warm(LocalSampler):
        def draw(self, role: Role, prompts: Any, sampling: Any, *rest: Any) -> Samples:
            return super().draw(role, prompts, dataclasses.replace(sampling, temperature=1.6), *rest)

    parts.collector = dataclasses.replace(parts.collector, sampler=Warm(parts.session.roles))
    assert "or its logits are scaled: the log-probs agree best at about 1.6" in parts.fails("sampled")


def test_positions_counted_over_the_padding(
    tiny_gpt2: Path, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2 counts positions itself unless given, so rows padded on the left are then read wrongly."""
    base = {"model": str(tiny_gpt2), "dtype": "float32"}
    session = open_session(load_recipe(write_recipe(reward=None, base=base, rl=RL | FUNCTION)), tmp_path / "out")
    spread_positions(session)
    parts = ready(session)
    parts.check()

    def hidden(_: Decoder, lm: Any, ids_BL: torch.Tensor, mask_BL: torch.Tensor, *__: Any) -> torch.Tensor:
        states: torch.Tensor = lm.base_model(input_ids=ids_BL, attention_mask=mask_BL.long()).last_hidden_state
        return states

    monkeypatch.setattr(Decoder, "hidden", hidden)
    assert "rows read alone agree, but not rows read together" in parts.fails("sampled")


@torch.no_grad()
def spread_positions(session: Session) -> None:
    """Spread the position embeddings, which hardly differ when untrained."""
    roles = session.roles
    assert isinstance(roles, SharedBase)
    roles.lm.base_model.wpe.weight.mul_(20)
    roles._as_loaded = fingerprint(roles._base_tensors())


def test_answers_that_end_with_another_token_than_the_reward_was_trained_on(parts: Parts) -> None:
    eos = parts.session.base.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    parts.ends_with(eos)
    remedy = parts.fails("end")
    assert "completions here end with '<|endoftext|>'" in remedy
    assert "those on which the reward was trained end with '<|im_end|>'" in remedy


def test_an_answer_is_scored_with_the_end_that_the_reward_was_trained_on(parts: Parts) -> None:
    """This holds for any other end token, here one from the generation configuration."""
    chat = parts.session.base.chat
    other = chat.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    chat.end_ids = (chat.end_id, other)
    parts.collector = setup_collector(parts.session)
    assert parts.collector.sampling.end_ids == (chat.end_id, other)
    ids = [[4, 5, 6, chat.end_id], [4, 5, 6, other], [4, 5, 6, 7]]
    mask_BL, ended_B = torch.ones(3, 4).bool(), torch.ones(3).bool()
    samples = Samples(torch.tensor(ids), mask_BL, [1] * 3, [3] * 3, ended_B, torch.zeros(3, 3))
    (model,) = parts.collector.reward.models
    usual, with_other, without = model.scores(samples)[0].tolist()
    assert usual == with_other != without
    assert samples.ids_BL.tolist() == ids, "the policy learns what it drew"
    stamps = {Role.REWARD: parts.session.stamp(Role.REWARD)}
    read = RewardModel(parts.session.roles, stamps, 4, (chat.end_id,)).scores(samples)[0]
    assert float(read[1]) != usual
    chat.end_ids = (chat.end_id, *range(20, 250))  # enough that all answers end with other tokens
    parts.collector = setup_collector(parts.session)
    assert all(finding.figure <= 1e-5 for finding in parts.check())


def test_a_reward_read_before_the_end(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    def early(samples: Samples, rows: list[int]) -> Samples:
        batch = trim(samples, rows)
        last_B = batch.mask_BL.long().cumsum(1).argmax(1)
        return dataclasses.replace(batch, mask_BL=batch.mask_BL.scatter(1, last_B[:, None], False))

    monkeypatch.setattr(perl.rl.rewards.model, "trim", early)
    assert "padding is on the wrong side" in parts.fails("end")


def test_a_failure_stops_the_run_with_status_1_before_anything_is_trained(trained: Path, run_cli: RunCli) -> None:
    file = trained / "reward" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {HEAD: torch.zeros_like(tensors[HEAD])}, file, {"format": "pt"})
    code, text = run_cli("run", trained / "recipe.yaml", "--out", trained)
    assert code == 1
    assert "✗ Preflight" in text
    assert "preflight failed before the first update" in text
    assert "the head was lost on saving" in text
    assert not (trained / "policy" / "metrics.jsonl").exists()
    assert not list((trained / "policy").glob("checkpoints/*"))


def test_what_is_checked_are_eight_answers_at_most(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def watch(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.append(len(keywords.get("ids_BL", arguments[1] if arguments[1:] else ())))

    parts.session.roles.register_forward_pre_hook(watch, with_kwargs=True)
    parts.check()
    assert max(seen) <= 8
    assert sum(seen) < 400
