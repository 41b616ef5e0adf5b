"""Stages that start from an external adapter: outputs are equal, and adapters that cannot be used are refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    MissConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from perl.adapters import ADAPTERS
from perl.adapters.folder import AdapterFolder, read_adapter_folder
from perl.backbones.loading import load_base
from perl.errors import UserError
from perl.predict import predict, read_subject
from perl.recipe import load_recipe
from perl.recipe.adapter import REFUSED, REWRITES
from perl.roles.export_formats import save_adapter
from perl.roles.role import Role
from perl.roles.saved import save_role, stamp_for
from perl.roles.shared_base import SharedBase
from perl.roles.started import load_start
from perl.stages.opening import open_run, open_session
from tests.conftest import RunCli, WriteRecipe
from tests.encoder_decoders import tiny_t5
from tests.tiny import KINDS, adapter_of_kind, lora, random_llama

CPU = torch.device("cpu")
IDS = torch.arange(3, 27).view(3, 8)
QV = ["q_proj", "v_proj"]
FOREIGN: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=3, lora_alpha=5, target_modules=QV),
    "rslora": lambda: LoraConfig(r=3, lora_alpha=5, target_modules=QV, use_rslora=True, layers_to_transform=[1]),
    "dora": lambda: LoraConfig(r=3, target_modules="all-linear", use_dora=True, init_lora_weights="gaussian"),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": lambda: VeraConfig(r=5, target_modules=QV, projection_prng_key=7),
    "miss": lambda: MissConfig(r=4, target_modules=r".*\.1\..*(q|k)_proj"),
}
"""peft's configurations by PERL's kind of adapter."""


def make(folder: Path, base: Path, config: PeftConfig, scores: bool = False) -> PeftModel:
    """Create and save an adapter with peft alone."""
    config.task_type = "SEQ_CLS" if scores else "CAUSAL_LM"
    torch.manual_seed(3)
    options = {"num_labels": 1, "pad_token_id": 0} if scores else {}
    model = (LlamaForSequenceClassification if scores else LlamaForCausalLM).from_pretrained(base, **options)
    adapted: PeftModel = get_peft_model(model, config).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    adapted.save_pretrained(str(folder))
    return adapted


def kind_of(folder: AdapterFolder, lm: LlamaForCausalLM) -> SharedBase:
    """Return the kind that a recipe detects for the adapter."""
    row, named = ADAPTERS[folder.kind], {} if folder.kind == "lora" else {"kind": folder.kind}
    return SharedBase(row(lm, row.settings_type.model_validate({**named, **folder.settings})))


@torch.no_grad()
def logits(roles: SharedBase, role: Role) -> torch.Tensor:
    with roles.role(role):
        found: torch.Tensor = roles.lm(IDS).logits
    return found


@pytest.mark.parametrize("kind", FOREIGN)
@torch.no_grad()
def test_an_adapter_of_peft_computes_here_as_there(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    theirs = make(tmp_path, tiny_llama, FOREIGN[kind]())
    base, lm = load_base(str(tiny_llama), torch.float32, CPU)
    folder = read_adapter_folder(tmp_path, "sft.adapter")
    assert folder.kind == kind
    roles = kind_of(folder, lm)  # type: ignore[arg-type]
    bare = logits(roles, Role.BASE)
    roles.add(Role.SFT)
    assert load_start(roles, Role.SFT, folder, base) == []
    expected = theirs(IDS).logits
    assert (bare - expected).abs().max() > 1e-3
    torch.testing.assert_close(logits(roles.eval(), Role.SFT), expected, rtol=1e-4, atol=1e-4)
    roles.clear()
    assert torch.equal(logits(roles, Role.BASE), bare)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_has_written_can_be_started_from(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    """This works from the run folder and from an export."""
    base, lm = load_base(str(tiny_llama), torch.float32, CPU)
    roles = SharedBase(adapter_of_kind(lm, kind, layers="top-half"))
    roles.add(Role.SFT)
    for parameter in roles.parameters_of(Role.SFT):
        parameter.data += 0.2
    save_role(roles, Role.SFT, tmp_path / "run", stamp_for(Role.SFT, base))
    folders = [tmp_path / "run"]
    if kind not in ("series", "parallel", "prefix"):
        (tmp_path / "exported").mkdir()
        save_adapter(roles, Role.SFT, Role.SFT, base.name, tmp_path / "exported")
        folders.append(tmp_path / "exported")
    expected = logits(roles, Role.SFT)
    for path in folders:
        roles.clear()
        folder = read_adapter_folder(path, "sft.adapter")
        roles = kind_of(folder, lm)  # type: ignore[arg-type]
        roles.add(Role.SFT)
        assert load_start(roles, Role.SFT, folder, base) == []
        assert torch.equal(logits(roles, Role.SFT), expected)


def test_an_encoder_decoders_adapter_is_started_from(tmp_path: Path) -> None:
    """It has peft's task type for them; a reward model's adapter, with its head, is only for a reward model."""
    base, lm = load_base(str(tiny_t5(tmp_path / "t5")), torch.float32, CPU)
    theirs = get_peft_model(lm, LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    roles = SharedBase(lora(theirs.unload(), 2, 8, targets=["q", "v"]))
    roles.add(Role.REWARD, head=True)
    for role in (Role.SFT, Role.REWARD):
        roles.clear()
        roles.add(role, head=role is Role.REWARD)
        notes = load_start(roles, role, read_adapter_folder(tmp_path / "theirs", "sft.adapter"), base)
        assert notes == (["it has no head, so the head starts at zero"] if role is Role.REWARD else [])
    with torch.no_grad():
        roles.head(Role.REWARD).weight.fill_(2.0)
    save_role(roles, Role.REWARD, tmp_path / "reward", stamp_for(Role.REWARD, base))
    saved = read_adapter_folder(tmp_path / "reward", "reward.adapter")
    roles.clear()
    roles.add(Role.REWARD, head=True)
    assert load_start(roles, Role.REWARD, saved, base) == []
    assert bool((roles.head(Role.REWARD).weight == 2.0).all())
    roles.add(Role.SFT)
    with pytest.raises(UserError, match="a language model's with a head"):
        load_start(roles, Role.SFT, saved, base)


SFT = {"batch_size": 4, "max_length": 64, "epochs": 1}
REWARD = {"loss": "thumbs", "epochs": 1, "batch_size": 4, "max_length": 64}


@pytest.fixture
def foreign(tiny_llama: Path, tmp_path: Path) -> Path:
    make(tmp_path / "foreign", tiny_llama, FOREIGN["lora"]())
    return tmp_path / "foreign"


@pytest.fixture
def recipe(write_recipe: WriteRecipe, mixed_data: Path, foreign: Path) -> Callable[..., Path]:
    """Return a writer of SFT recipes that start from the foreign adapter; `changes` replace keys."""

    def write(**changes: Any) -> Path:
        data = {"source": "jsonl", "path": str(mixed_data), "held_out": 0.3}
        sft = {**SFT, "adapter": "foreign"}
        return write_recipe(**{"lora": None, "data": data, "sft": sft, "reward": None, "rl": None, **changes})

    return write


def test_sft_goes_on_from_it_and_says_so(
    recipe: Callable[..., Path], foreign: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    file, out = recipe(checkpoint_every=1), tmp_path / "out"
    code, text = run_cli("run", file, "--out", out)
    assert code == 0, text
    assert f"sft starts from the adapter in {foreign}" in " ".join(text.split())
    assert load_recipe(out / "recipe.yaml").adapter_settings.model_dump(include={"rank", "alpha", "targets"}) == {
        "rank": 3,
        "alpha": 5,
        "targets": QV,
    }
    start = json.loads((out / "report.json").read_text())["stages"]["sft"]["started_from"]
    stamp = json.loads((out / "sft/adapter/perl.json").read_text())
    assert start == {"folder": str(foreign), "sha256": stamp["started_sha256"]}
    assert stamp["started_from"] == str(foreign)
    assert f"SFT started from the adapter in {foreign}" in (out / "report.html").read_text()
    code, text = run_cli("export", out, "sft", tmp_path / "exported")
    assert code == 0, text
    assert (
        f"started from | the adapter in `foreign`, SHA-256 of its weights `{start['sha256']}`"
        in (tmp_path / "exported/README.md").read_text()
    )
    # Resumed from its first checkpoint, it ends in the same bytes.
    learned = out / "sft/adapter/adapter_model.safetensors"
    before = learned.read_bytes()
    for late in sorted((out / "sft/checkpoints").iterdir())[1:]:
        shutil.rmtree(late)
    (out / "sft/result.json").unlink()
    code, text = run_cli("run", file, "--out", out)
    assert code == 0, text
    assert learned.read_bytes() == before
    # With another adapter it is another stage.
    weights = foreign / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    code, text = run_cli("run", file, "--out", out)
    assert code == 2
    assert "the file of sft.adapter has changed" in " ".join(text.split())


def test_policy_and_reference_start_as_it(
    recipe: Callable[..., Path], foreign: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    settings = {
        "adapter": "foreign",
        "reward": {"function": "rewards.py:length"},
        "steps": 1,
        "prompts_per_step": 2,
        "max_new_tokens": 4,
        "eval_prompts": 2,
    }
    out = tmp_path / "out"
    code, text = run_cli("run", recipe(sft=None, rl=settings), "--out", out)
    assert code == 0, text
    sft, policy = (load_file(out / role / "adapter/adapter_model.safetensors") for role in ("sft", "policy"))
    theirs = load_file(foreign / "adapter_model.safetensors")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in sft.items())
    moved = max(float((policy[name] - theirs[name]).abs().max()) for name in theirs)
    assert 0 < moved < 0.1, "it started there"
    stamp = json.loads((out / "policy/adapter/perl.json").read_text())
    assert (stamp["parent"], stamp["started_from"]) == ("sft", str(foreign))
    result = json.loads((out / "policy/result.json").read_text())
    assert "sft reloaded" in {check["name"] for check in result["preflight"]}
    # The run folder is self-contained.
    shutil.rmtree(foreign)
    code, text = run_cli("evaluate", out, "policy")
    assert code == 0, text
    code, text = run_cli("run", out / "recipe.yaml", "--out", out)
    assert code == 2
    assert "rl.adapter" in text


@pytest.mark.parametrize("scores", [True, False])
def test_a_reward_model_starts_with_the_head_that_there_is(
    scores: bool, recipe: Callable[..., Path], tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = make(tmp_path / "foreign", tiny_llama, FOREIGN["lora"](), scores)
    file = recipe(sft=None, reward={**REWARD, "adapter": "foreign"})
    session = open_session(load_recipe(file), tmp_path / "out")
    capsys.readouterr()
    session.add_trained(Role.REWARD, head=True)
    said = " ".join("".join(capsys.readouterr()).split())
    ids_BL, mask_BL = IDS, torch.ones_like(IDS, dtype=torch.bool)
    found = session.roles.eval()(Role.REWARD, ids_BL, mask_BL, head=Role.REWARD).scores_B
    if scores:
        with torch.no_grad():
            torch.testing.assert_close(found, theirs(IDS).logits[:, 0], rtol=1e-4, atol=1e-5)
        assert "no head" not in said
    else:
        assert not found.any()
        assert "it has no head, so the head starts at zero" in said


def test_what_it_will_need_is_estimated_of_its_shape(recipe: Callable[..., Path]) -> None:
    loaded = load_recipe(recipe())
    memory = predict(loaded, read_subject(loaded))["sft"]
    assert {peak.kinds["adapters"] for peak in memory.values() if "adapters" in peak.kinds} == {4 * 2 * 2 * 3 * 64}


def edited(**keys: Any) -> Callable[[Path], None]:
    """Change keys of a configuration; None removes one."""

    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        content = json.loads(file.read_text()) | keys
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def retensored(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


NARROW = {"hidden_size": 16, "intermediate_size": 32}


def on_another_base(folder: Path) -> None:
    other = folder.parent / "narrow"
    random_llama(**NARROW).save_pretrained(other)
    shutil.rmtree(folder)
    make(folder, other, FOREIGN["lora"]())


def replaced(config: Callable[[], PeftConfig]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        config().save_pretrained(str(folder))

    return write


def stamped(folder: Path) -> None:
    stamp = {
        "role": "sft",
        "base": "org/other",
        "base_sha256": "0" * 64,
        "tokenizer_sha256": "",
        "chat_sha256": "",
    }
    (folder / "perl.json").write_text(json.dumps({**stamp, "end_id": 0}))


A_Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing there": (shutil.rmtree, "no adapter: there is no adapter_config.json"),
    "broken": (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
    "no list": (edited(target_modules=5), "cannot be read"),
    "no name": (edited(target_modules=[5]), "cannot be read"),
    "no number": (edited(r="many"), "cannot be read: rank: Input should be a valid integer"),
    "pickled": (pickled, "its weights are in adapter_model.bin, and pickles are never read"),
    "AdaLoRA": (
        replaced(lambda: AdaLoraConfig(target_modules=QV, total_step=9, tinit=1, tfinal=2)),
        "kind adalora are not supported, because it moves ranks",
    ),
    "cannot score": (
        replaced(lambda: PromptTuningConfig(num_virtual_tokens=4)),
        "kind prompt_tuning are not supported, because it puts virtual tokens before the text",
    ),
    "unknown": (edited(peft_type="NEWEST"), "kind newest are not supported Supported kinds: lora, rslora"),
    "PiSSA": (edited(init_lora_weights="pissa_niter_4"), "pissa are not supported, because it rewrites the base"),
    "KaSA": (edited(kasa_config={"beta": 1.0}), "kind kasa are not supported, because it rewrites the base"),
    "an option": (edited(rank_pattern={"q_proj": 2}), 'its configuration has rank_pattern: {"q_proj": 2}'),
    "task": (edited(task_type="TOKEN_CLS"), "the adapter is for TOKEN_CLS; sft needs a language model's"),
    "classifier": (edited(task_type="SEQ_CLS"), "the adapter is a sequence classifier's; sft needs"),
    "another base": (on_another_base, f"lora.layers: [0, 1]: {A_Q} is (3, 16), here (3, 32); it was trained on"),
    "stamp of another base": (stamped, "belongs to another base: org/other, SHA-256 000000000000; here it is"),
    "a tensor less": (retensored(lambda tensors: tensors.pop(A_Q)), f"{A_Q} is missing, here (3, 32)"),
    "a tensor more": (
        retensored(lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)})),
        "base_model.model.lm_head.weight is (2, 2), here missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_started_from_is_refused(
    case: str, recipe: Callable[..., Path], foreign: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    file = recipe()
    change, says = REFUSALS[case]
    change(foreign)
    code, text = run_cli("run", file, "--out", tmp_path / "out")
    said = " ".join(text.split())
    assert code == 2, text
    assert says in said, text
    assert "sft.adapter" in said
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"lora": {"rank": 8}},
            "has rank 3, but the recipe sets lora.rank: 8 Use another folder, or remove lora.rank",
        ),
        ({"adapter": {"kind": "dora"}}, "has kind lora, but the recipe sets adapter.kind: dora"),
        ({"lora": {"targets": "attention"}}, 'lora.targets: "attention" and lora.layers: [0, 1]: '),
        (
            {"reward": {**REWARD, "adapter": "other"}},
            "has rank 2, but the recipe, or sft.adapter: {tmp}/foreign, sets lora.rank: 3",
        ),
        ({"tuning": "full"}, "full tuning has no adapters to start from"),
        (
            {"rl": {"adapter": "foreign", "reward": {"function": "rewards.py:length"}}},
            "rl.adapter has no effect with a section sft",
        ),
        (
            {"sft": {**SFT, "max_length": 16}, "adapter": {"kind": "prefix", "length": 17}},
            "a prefix of 17 positions is longer than the rows of sft.max_length, which is 16",
        ),
    ],
)
def test_a_recipe_that_says_otherwise_is_refused(
    changes: dict[str, Any],
    says: str,
    recipe: Callable[..., Path],
    tiny_llama: Path,
    run_cli: RunCli,
    tmp_path: Path,
) -> None:
    make(tmp_path / "other", tiny_llama, LoraConfig(r=2, target_modules=QV))
    code, text = run_cli("run", recipe(**changes), "--out", tmp_path / "out")
    assert code == 2, text
    assert says.replace("{tmp}", str(tmp_path)) in " ".join(text.split()), text


def test_kinds_that_rewrite_the_base_are_refused_by_either_name(
    recipe: Callable[..., Path], foreign: Path, write_recipe: WriteRecipe
) -> None:
    config = (foreign / "adapter_config.json").read_text()
    rewriting = [kind for kind, why in REFUSED.items() if why == REWRITES]
    assert set(rewriting) == {"pissa", "olora", "corda", "loftq", "lora_ga", "kasa", "osf"}
    for kind in rewriting:
        with pytest.raises(UserError, match=rf"(?s)adapter: kind {kind} is not supported, because it rewrites"):
            load_recipe(write_recipe(lora=None, adapter={"kind": kind}))
        (foreign / "adapter_config.json").write_text(config)
        edited(**{"peft_type": "OSF"} if kind == "osf" else {"init_lora_weights": kind})(foreign)
        with pytest.raises(
            UserError, match=rf"(?s)sft\.adapter: .* kind {kind} are not supported, because it rewr"
        ):
            load_recipe(recipe())
    PromptTuningConfig(num_virtual_tokens=4).save_pretrained(str(foreign))
    with pytest.raises(
        UserError, match=r"(?s)reward\.adapter: .*prompt_tuning.* which no reward model, critic or"
    ):
        load_recipe(recipe(sft=None, reward={**REWARD, "adapter": "foreign"}))
    with pytest.raises(UserError, match=r"(?s)kind adalora is not supported.*policy and critic are two"):
        load_recipe(write_recipe(lora=None, adapter={"kind": "adalora"}))


def test_random_matrices_that_are_not_those_of_the_seed_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    make(tmp_path, tiny_llama, FOREIGN["vera"]())
    retensored(lambda tensors: tensors["base_model.vera_A"].mul_(2))(tmp_path)
    base, lm = load_base(str(tiny_llama), torch.float32, CPU)
    folder = read_adapter_folder(tmp_path, "sft.adapter")
    roles = kind_of(folder, lm)  # type: ignore[arg-type]
    roles.add(Role.SFT)
    with pytest.raises(
        UserError, match=r"sft\.adapter: .*its base_model\.vera_A, which is never trained, differs"
    ):
        load_start(roles, Role.SFT, folder, base)


def test_another_architecture_is_refused_by_the_name_of_the_folder(
    recipe: Callable[..., Path], tiny_gpt2: Path
) -> None:
    loaded = load_recipe(recipe(base={"model": str(tiny_gpt2), "dtype": "float32"}))
    with pytest.raises(UserError, match=r"(?s)sft\.adapter: .*does not fit the base: no module matches 'q_proj'"):
        open_session(loaded, Path("nowhere"))


def test_what_rl_started_from_is_taken_with_it(
    recipe: Callable[..., Path], run_cli: RunCli, tmp_path: Path
) -> None:
    settings = {"adapter": "foreign", "reward": {"function": "rewards.py:length"}, "steps": 1}
    file = recipe(sft=None, rl={**settings, "prompts_per_step": 2, "max_new_tokens": 4, "eval_prompts": 2})
    for options in (("--out", tmp_path / "one"), ("--out", tmp_path / "two", "--from", tmp_path / "one")):
        code, text = run_cli("run", file, *options)
        assert code == 0, text
    assert re.search(r"rl is taken from", text)
    session = open_run(tmp_path / "two")
    session.load(Role.SFT)
    assert session.roles.reference is Role.SFT


def test_another_adapter_may_be_named_until_rl_has_a_checkpoint(
    recipe: Callable[..., Path], foreign: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """The copy made by a failed run is not used instead."""
    settings = {"adapter": "foreign", "reward": {"function": "rewards.py:length"}, "prompts_per_step": 2}
    file = recipe(sft=None, rl={**settings, "max_new_tokens": 4})
    other = tmp_path / "other"
    shutil.copytree(foreign, other)
    theirs = {name: 2 * tensor for name, tensor in load_file(foreign / "adapter_model.safetensors").items()}
    save_file(theirs, other / "adapter_model.safetensors")
    for folder in (foreign, other):
        session = open_session(load_recipe(file, [f"rl.adapter={folder}"]), tmp_path / "out")
        session.load(Role.SFT)
        assert session.stamp(Role.SFT).started_from == str(folder)
    found = session.roles.weights(Role.SFT)
    assert all(
        torch.equal(tensor, found[name.removeprefix("base_model.model.")]) for name, tensor in theirs.items()
    )
