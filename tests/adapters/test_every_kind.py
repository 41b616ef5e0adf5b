"""Properties of every kind of adapter: roles on one base, training, saving and export."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM

from perl.adapters import ADAPTERS
from perl.backbones.loading import load_base
from perl.errors import UserError
from perl.parallel.engine import Fsdp2
from perl.parallel.processes import ALONE
from perl.recipe import Recipe
from perl.recipe.adapter import BUILT_IN
from perl.results import RlStage
from perl.rl.checks.liveness import unchanged_ranks
from perl.rl.checks.wiring import adapters_as_configured
from perl.rl.collector import read_completions
from perl.rl.samplers.base import Sampling
from perl.rl.samplers.local import LocalSampler
from perl.roles.export_formats import merge, save_adapter
from perl.roles.role import Role
from perl.roles.saved import load_role, save_role, stamp_for
from perl.roles.shared_base import SharedBase
from perl.stages.opening import open_run
from perl.stages.training import scale_learning_rate
from tests.conftest import RunCli, WriteRecipe
from tests.tiny import KINDS, adapter_of_kind, random_llama

every_kind = pytest.mark.parametrize("kind", KINDS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
CPU = torch.device("cpu")
OTHERWISE: dict[str, dict[str, Any]] = {
    "lora": {"alpha": 4},
    "rslora": {"alpha": 4},
    "dora": {"alpha": 4},
    "ia3": {"targets": "attention"},
    "vera": {"projection_seed": 1},
    "miss": {"rank": 4},
    "series": {"activation": "relu"},
    "parallel": {"scale": 2.0},
    "tinylora": {"projection_seed": 1},
    "prefix": {"length": 4},
}
"""Settings under which the same weights would compute something else."""


def roles_of(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> SharedBase:
    """Return roles on a model with biases, whose only randomness is its weights."""
    lm = random_llama(dtype, attention_bias=True, mlp_bias=True)
    for name, parameter in lm.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return SharedBase(adapter_of_kind(lm, kind, **settings))


def learned(roles: SharedBase, *roles_added: Role, **add: Any) -> SharedBase:
    """Move the roles far from the base and from one another."""
    generator = torch.Generator().manual_seed(1)
    for role in roles_added:
        roles.add(role, **add)
        for parameter in roles.parameters_of(role):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return roles


def batch() -> tuple[Tensor, Tensor]:
    return torch.arange(3, 27).view(3, 8), torch.ones(3, 8, dtype=torch.bool)


def log_probs(
    roles: SharedBase, role: Role, ids_BL: Tensor | None = None, mask_BL: Tensor | None = None
) -> Tensor:
    ids_BL, mask_BL = batch() if ids_BL is None or mask_BL is None else (ids_BL, mask_BL)
    found = roles(role, ids_BL, mask_BL, completion_length=4, temperature=1.0).log_probs_BT
    assert found is not None
    return found


def test_no_kind_is_left_out() -> None:
    """The tests' settings and the recipe's schema, which works without torch, have all kinds."""
    assert set(KINDS) == set(OTHERWISE) == {"lora", *BUILT_IN} == set(ADAPTERS)
    assert all(ADAPTERS[kind].settings_type is settings for kind, settings in BUILT_IN.items())


@both_dtypes
@every_kind
def test_roles_are_trained_one_after_the_other(kind: str, dtype: torch.dtype) -> None:
    """The order is that of stages: SFT, then a reward model with its head, then a policy that starts from SFT."""
    roles = roles_of(kind, dtype)
    modules = [type(module) for module in roles.lm.modules()]
    before, bare = roles.base_sha256(), log_probs(roles, Role.BASE)
    read: dict[Role, Tensor] = {}
    for role, start in ((Role.SFT, Role.BASE), (Role.REWARD, Role.BASE), (Role.POLICY, Role.SFT)):
        roles.add(role, copy_of=start, head=role is Role.REWARD)
        assert torch.equal(log_probs(roles, role), read.get(start, bare)), "it begins as what it starts from"
        parameters = roles.train_only(role)
        assert {parameter.dtype for parameter in parameters} == {torch.float32}
        optimizer = torch.optim.AdamW(parameters, lr=0.05)
        for _ in range(2):  # factors before a zero have no gradient at first
            optimizer.zero_grad()
            loss = -log_probs(roles, role).mean()
            if role is Role.REWARD:
                loss = loss + roles(role, *batch(), head=role).scores_B.sum()  # type: ignore[union-attr]
            loss.backward()
            optimizer.step()
        got = {name for name, parameter in roles.named_parameters() if parameter.grad is not None}
        own = {name for name, parameter in roles.named_parameters() if parameter.requires_grad}
        assert got == own
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters)
        optimizer.zero_grad()
        read[role] = log_probs(roles, role).detach()
        assert (read[role] - bare).abs().max() > 1e-3
    for role, expected in read.items():
        assert torch.equal(log_probs(roles, role), expected), "roles do not touch one another"
    assert torch.equal(log_probs(roles, Role.BASE), bare)
    assert roles.base_sha256() == before
    assert roles.base_changed() == []
    roles.adapter.remove()
    assert [type(module) for module in roles.lm.modules()] == modules
    assert torch.equal(log_probs(roles, Role.BASE), bare)
    assert not any(part._forward_hooks for part in roles.lm.modules())


LINEAR = [(32, 32)] * 4 + [(32, 64)] * 2 + [(64, 32)]
"""Inputs and outputs of the layers of one block."""
TRAINED = {
    "lora": sum(4 * (i + o) for i, o in LINEAR),
    "rslora": sum(4 * (i + o) for i, o in LINEAR),
    "dora": sum(4 * (i + o) + o for i, o in LINEAR),
    "ia3": 32 + 32 + 64,
    "vera": sum(8 + o for _, o in LINEAR),
    "miss": sum(6 * o for _, o in LINEAR),
    "series": 2 * 8 * 32,
    "parallel": 2 * 8 * 32,
    "tinylora": 7 * 5,
    "prefix": 2 * 3 * 32 + 4,
}


@every_kind
def test_what_is_trained_is_counted_and_has_the_start_that_is_told(kind: str) -> None:
    roles = roles_of(kind)
    roles.add(Role.POLICY)
    weights = roles.weights(Role.POLICY)
    assert sum(parameter.numel() for parameter in weights.values()) == 2 * TRAINED[kind]
    known = {name: value for name in weights if (value := roles.adapter.starting_value(name)) is not None}
    assert known
    for name, value in known.items():
        assert (weights[name] == value).all(), name
    assert unchanged_ranks(roles.adapter, weights, {}) == {
        "ia3": 0,
        "vera": 0,
        "miss": 6,
        "tinylora": 0,
        "prefix": 0,
    }.get(kind, 8 if kind in ("series", "parallel") else 4)
    for parameter in weights.values():
        parameter.data += 0.1
    assert unchanged_ranks(roles.adapter, weights, {}) == 0


@both_dtypes
@every_kind
def test_each_layer_adds_what_it_is_defined_to(kind: str, dtype: torch.dtype) -> None:
    roles = learned(roles_of(kind, dtype), Role.SFT, Role.POLICY).eval()
    assert isinstance(roles, SharedBase)
    assert len(list(roles.adapter.layers("policy"))) == {"ia3": 6, "series": 2, "parallel": 2, "prefix": 2}.get(
        kind, 14
    )
    assert [finding.figure for finding in adapters_as_configured(roles)] == [0, 0]


@every_kind
def test_layers_that_add_something_else_are_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    roles = learned(roles_of(kind), Role.SFT, Role.POLICY).eval()
    assert isinstance(roles, SharedBase)
    adapter = roles.adapter
    monkeypatch.setattr(adapter, "activate", lambda role: type(adapter).activate(adapter, "sft"))
    assert all(finding.figure > 0 for finding in adapters_as_configured(roles))


@every_kind
def test_checkpointed_activations_give_the_same_gradients(kind: str) -> None:
    roles = learned(roles_of(kind), Role.SFT, Role.POLICY)
    parameters = roles.train_only(Role.POLICY)
    gradients = []
    for checkpointed in (False, True):
        with roles.checkpointed(checkpointed):
            loss = log_probs(roles, Role.POLICY).sum()
            log_probs(roles, Role.SFT)  # another role computes between forward and backward
            gradients.append(torch.autograd.grad(loss, parameters))
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)
        assert plain.any()


@every_kind
def test_the_side_of_padding_does_not_matter(kind: str) -> None:
    roles = learned(roles_of(kind), Role.POLICY)
    ids_BL, mask_BL = batch()
    alone = log_probs(roles, Role.POLICY, ids_BL, mask_BL)
    left = nn.functional.pad(ids_BL, (3, 0)), nn.functional.pad(mask_BL, (3, 0))
    torch.testing.assert_close(log_probs(roles, Role.POLICY, *left), alone, rtol=1e-4, atol=1e-4)
    right = nn.functional.pad(ids_BL, (0, 3)), nn.functional.pad(mask_BL, (0, 3))
    padded = roles(Role.POLICY, *right, completion_length=7, temperature=1.0).log_probs_BT
    assert padded is not None
    torch.testing.assert_close(padded[:, :4], alone, rtol=1e-4, atol=1e-4)


@both_dtypes
@every_kind
def test_the_sampler_says_what_a_forward_pass_says(kind: str, dtype: torch.dtype) -> None:
    """This holds with weights prepared for sampling, and with the blocks below the adapters computed once."""
    roles = learned(roles_of(kind, dtype, layers="top-half"), Role.POLICY).eval()
    assert isinstance(roles, SharedBase)
    assert roles.shared_blocks == 1
    sampling = Sampling(max_new_tokens=12, temperature=0.7, end_ids=(5,), pad_id=0, prompts_at_once=2)
    prompts = [list(range(3, 3 + length)) for length in (3, 9, 1)]
    samples = LocalSampler(roles).draw(Role.POLICY, prompts, sampling, torch.Generator().manual_seed(0))
    mask_BT, drawn_BT = samples.completion_mask_BT, samples.sampler_log_probs_BT
    tolerance = 1e-4 if dtype is torch.float32 else 0.2
    for seen in (samples, replace(samples, lower_hidden_BLD=None)):
        read_BT, _ = read_completions(roles, Role.POLICY, seen, 7, temperature=0.7, head=None)
        torch.testing.assert_close(read_BT[mask_BT], drawn_BT[mask_BT], rtol=tolerance, atol=tolerance)


@every_kind
def test_gradients_above_the_shared_blocks_are_those_of_all_blocks(kind: str) -> None:
    roles = learned(roles_of(kind, layers="top-half"), Role.POLICY)
    parameters = roles.train_only(Role.POLICY)
    found = []
    for lower_hidden_BLD in (None, roles.lower_hidden(*batch())):
        outputs = roles(
            Role.POLICY, *batch(), completion_length=4, temperature=1.0, lower_hidden_BLD=lower_hidden_BLD
        )
        assert outputs.log_probs_BT is not None
        found.append(torch.autograd.grad(outputs.log_probs_BT.sum(), parameters))
    for whole, upper in zip(*found, strict=True):
        torch.testing.assert_close(upper, whole)


@every_kind
def test_it_is_saved_and_loaded_and_does_not_load_as_another(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    base, _ = load_base(str(tiny_llama), torch.float32, CPU)

    def fresh(kind: str, **settings: Any) -> SharedBase:
        _, lm = load_base(str(tiny_llama), torch.float32, CPU)
        return SharedBase(adapter_of_kind(lm, kind, **settings))

    roles, folder = learned(fresh(kind), Role.REWARD, head=True), tmp_path / "reward"
    save_role(roles, Role.REWARD, folder, stamp_for(Role.REWARD, base))
    again = fresh(kind)
    load_role(again, Role.REWARD, folder, base)
    expected = roles(Role.REWARD, *batch(), head=Role.REWARD).scores_B
    assert torch.equal(again(Role.REWARD, *batch(), head=Role.REWARD).scores_B, expected)
    others = [fresh(kind, **OTHERWISE[kind]), *(fresh(other) for other in KINDS if other != kind)]
    for other in others:
        with pytest.raises(UserError, match=r"has another .* than the recipe's (adapter|lora) section"):
            load_role(other, Role.REWARD, folder, base)


MERGED = [kind for kind in KINDS if kind not in ("series", "parallel", "prefix")]


@pytest.mark.parametrize("kind", MERGED)
@pytest.mark.filterwarnings("ignore:Specified to not (load|save) vera_A")
def test_peft_and_the_merged_weights_compute_what_the_role_does(kind: str, tmp_path: Path) -> None:
    roles = learned(roles_of(kind, layers="top-half"), Role.SFT, Role.POLICY)
    theirs, whole = (copy.deepcopy(roles_of(kind, layers="top-half").lm) for _ in range(2))
    save_adapter(roles, Role.POLICY, Role.POLICY, "base", tmp_path)
    ids_BL, _ = batch()
    with torch.no_grad():
        with roles.role(Role.POLICY):
            expected = roles.lm(ids_BL).logits
        bare = whole(ids_BL).logits
        merged = merge(whole, roles, Role.POLICY)(ids_BL).logits
        loaded = PeftModel.from_pretrained(theirs, tmp_path)(ids_BL).logits
    assert (bare - expected).abs().max() > 1e-2
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["series", "parallel", "prefix"])
def test_what_peft_does_not_know_is_not_exported(kind: str, tmp_path: Path) -> None:
    roles = learned(roles_of(kind), Role.POLICY)
    with pytest.raises(UserError, match=r"peft does not read .* and they cannot be merged"):
        save_adapter(roles, Role.POLICY, Role.POLICY, "base", tmp_path)
    with pytest.raises(UserError, match="not amount to a change of weights"):
        merge(roles_of(kind).lm, roles, Role.POLICY)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    ).eval()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("miss", "prefix")])
def test_weights_that_stand_the_other_way_round(kind: str) -> None:
    roles = SharedBase(adapter_of_kind(gpt2(), kind))
    bare = log_probs(roles, Role.BASE)
    roles.add(Role.SFT)
    assert torch.equal(log_probs(roles, Role.SFT), bare)
    learned(roles, Role.POLICY).eval()
    assert [finding.figure for finding in adapters_as_configured(roles)] == [0, 0]
    if kind in MERGED:
        with roles.role(Role.POLICY), torch.no_grad():
            expected = roles.lm(batch()[0]).logits
            torch.testing.assert_close(
                merge(gpt2(), roles, Role.POLICY)(batch()[0]).logits, expected, rtol=1e-4, atol=1e-4
            )


WHOLE_RUNS = ("dora", "ia3", "series", "tinylora", "prefix")
"""One kind of each structure; other tests run LoRA, and the engines' tests run PPO with VeRA."""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in WHOLE_RUNS else pytest.mark.slow) for kind in KINDS]
)
def test_a_run_of_sft_and_ppo_passes_all_checks(
    kind: str, write_recipe: WriteRecipe, run_cli: RunCli, mixed_data: Path, tmp_path: Path
) -> None:
    """The critic has its own adapter, the lower blocks are computed once, and the run is resumed."""
    file = write_recipe(
        lora=None,
        adapter={"kind": kind, "layers": "top-half", **KINDS[kind]},
        data={"source": "jsonl", "path": str(mixed_data), "held_out": 0.3},
        checkpoint_every=1,
        sft={"batch_size": 4, "max_length": 64, "learning_rate": 0.01},
        rl={
            "algorithm": "ppo",
            "critic": "adapter",
            "steps": 4,
            "prompts_per_step": 4,
            "max_new_tokens": 4,
            "eval_prompts": 2,
            "learning_rate": 0.01,
        },
    )
    out = tmp_path / "out"
    code, text = run_cli("run", file, "--out", out)
    assert code == 0, text
    result = open_run(out).folder.result("rl")
    assert isinstance(result, RlStage)
    assert all(check.figure <= check.limit for check in (*result.preflight, *result.liveness))
    checked = {check.name for check in (*result.preflight, *result.liveness)}
    assert checked >= {"adapter in the forward pass", "adapter in the sampler", "roles apart", "policy learns"}
    steps = [json.loads(line) for line in (out / "policy" / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["movement"] > 1e-6
    for late in sorted((out / "policy" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(late)
    learned = out / "policy" / "adapter" / "adapter_model.safetensors"
    before = learned.read_bytes()
    (out / "policy" / "result.json").unlink()
    code, text = run_cli("run", file, "--out", out)
    assert code == 0, text
    assert learned.read_bytes() == before, "resumed, it ends in the same bytes"


def test_kinds_refuse_what_they_cannot_do(tiny_llama: Path) -> None:
    experts = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
        )
    )
    for kind in ("dora", "vera", "miss"):
        with pytest.raises(UserError, match=r"adapter\.targets: .* for linear layers only, .* belongs to experts"):
            adapter_of_kind(experts, kind)
    beside_them = adapter_of_kind(experts, "ia3").adapted
    assert beside_them == {f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv"}
    with pytest.raises(UserError, match=r"(?s)adapter\.rank: .* only 32 inputs.*Give at most 32"):
        adapter_of_kind(random_llama(), "miss", rank=33)
    with pytest.raises(UserError, match=r"adapters of kind miss do not fit this model"):
        SharedBase(adapter_of_kind(gpt2(), "miss")).add(Role.SFT)
    with pytest.raises(UserError, match=r"(?s)adapter\.targets: blocks have no part 'attn'.*mlp, self_attn"):
        adapter_of_kind(random_llama(), "series", targets=["attn"])
    with pytest.raises(UserError, match="DoRA needs the norms of whole rows"):
        SharedBase(adapter_of_kind(random_llama(), "dora"), Fsdp2(ALONE, False, False))
    content = {"name": "x", "base": {"model": "org/model", "quantization": "4bit"}, "reward": {}}
    with pytest.raises(ValidationError, match="dora need whole weights"):
        Recipe.model_validate({**content, "adapter": {"kind": "dora"}})
    with pytest.raises(ValidationError, match="kind osf is not supported, because it rewrites the base"):
        Recipe.model_validate({**content, "adapter": {"kind": "osf"}})


@pytest.mark.parametrize("kind", ["series", "parallel"])
def test_bottlenecks_stand_where_they_are_asked_for(kind: str) -> None:
    roles = roles_of(kind, targets="both", layers=[1])
    roles.add(Role.POLICY)
    assert {roles.adapter.module_of(name) for name in roles.weights(Role.POLICY)} == {
        "model.layers.1.mlp",
        "model.layers.1.self_attn",
    }
    bare = log_probs(roles, Role.BASE)
    assert torch.equal(log_probs(roles, Role.POLICY), bare)
    for parameter in roles.parameters_of(Role.POLICY):
        parameter.data += 0.1
    assert (log_probs(roles, Role.POLICY) - bare).abs().max() > 1e-3
    lm = OPTForCausalLM(
        OPTConfig(vocab_size=300, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4)
    )
    with pytest.raises(UserError, match="no part 'mlp'"):
        adapter_of_kind(lm, kind)
    roles = learned(SharedBase(adapter_of_kind(lm, kind, targets=["fc2"])), Role.POLICY)
    assert roles.weights(Role.POLICY)["model.decoder.layers.0.fc2.bottleneck_adapter.down"].shape == (
        8,
        32 if kind == "series" else 64,
    )
    assert (log_probs(roles, Role.POLICY) - log_probs(roles, Role.BASE)).abs().max() > 1e-3


def test_dropout_of_dora_is_on_only_in_training() -> None:
    roles = learned(roles_of("dora", dropout=0.5), Role.SFT)
    roles.train(False)
    assert torch.equal(log_probs(roles, Role.SFT), log_probs(roles, Role.SFT))
    roles.train(True)
    assert not torch.equal(log_probs(roles, Role.SFT), log_probs(roles, Role.SFT))


def test_b_learns_at_a_rate_of_its_own() -> None:
    """LoRA+: one step of SGD moves B by the ratio times its change at the plain rate, and A by the same change."""
    moved = []
    for ratio in (1.0, 4.0):
        roles = learned(roles_of("lora", b_learning_rate_ratio=ratio), Role.SFT)
        parameters = roles.train_only(Role.SFT)
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        for factor, weights in roles.by_learning_rate(Role.SFT).items():
            if factor != 1.0:
                scale_learning_rate(optimizer, weights, factor)
        before = {name: weight.detach().clone() for name, weight in roles.weights(Role.SFT).items()}
        log_probs(roles, Role.SFT).sum().backward()
        optimizer.step()
        moved.append({name: weight.detach() - before[name] for name, weight in roles.weights(Role.SFT).items()})
    for name, plain in moved[0].items():
        torch.testing.assert_close(moved[1][name], plain * (4 if "lora_B" in name else 1), rtol=1e-3, atol=1e-6)


def test_a_prefix_fits_the_context_and_the_model() -> None:
    with pytest.raises(UserError, match=r"a prefix of 257 positions is longer than the base's context of 256"):
        adapter_of_kind(random_llama(), "prefix", length=257)
    with pytest.raises(UserError, match="GPT2LMHeadModel does not support prefixes"):
        adapter_of_kind(gpt2(), "prefix")


@pytest.mark.parametrize("size", [1.0, 0.01])
def test_what_a_prefix_adds_is_relative_to_the_size_of_attention(size: float) -> None:
    lm = random_llama()
    for layer in lm.model.layers:
        layer.self_attn.v_proj.weight.data *= size
    projections = [layer.self_attn.o_proj for layer in lm.model.layers]
    roles, given = learned(SharedBase(adapter_of_kind(lm, "prefix")), Role.SFT), list[Tensor]()
    ids_BL, mask_BL = batch()
    with torch.no_grad():
        for role in (Role.BASE, Role.SFT):
            hook = projections[0].register_forward_hook(lambda layer, inputs, y: given.append(inputs[0]))
            log_probs(roles, role, ids_BL, mask_BL)
            hook.remove()
    plain, added = given[0], given[1] - given[0]
    relative = float(added.square().mean().sqrt() / plain.square().mean().sqrt())
    assert relative == pytest.approx(0.21, abs=0.01)


def test_a_prefix_has_gradients_where_attention_gives_nothing() -> None:
    lm = random_llama()
    for layer in lm.model.layers:
        layer.self_attn.v_proj.weight.data.zero_()
    roles = learned(SharedBase(adapter_of_kind(lm, "prefix")), Role.SFT)
    roles.train_only(Role.SFT)
    log_probs(roles, Role.SFT).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in roles.parameters_of(Role.SFT))
