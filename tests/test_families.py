"""One model of each common family in transformers: every role computes and trains, and the base does not change.

A test compares the table in docs/models.md with them.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BertConfig,
    DebertaV2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
)

from perl.backbones import Backbone, backbone_of, shared_prompts
from perl.backbones.base import weights_sha256
from perl.backbones.encoder_decoder_format import START
from perl.backbones.padding import left_pad
from perl.rl.samplers.base import Sampling
from perl.rl.samplers.local import LocalSampler
from perl.roles import split_layers
from perl.roles.outputs import Outputs
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from tests.encoder_decoders import BART, T5
from tests.encoders import TINY
from tests.tiny import LLAMA, lora

DOCS = Path(__file__).parent.parent / "docs" / "models.md"
SHAPE = {**LLAMA, "initializer_range": 0.2, "pad_token_id": 0}
GPT = {"vocab_size": 300, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 1}
ENCODER = {**TINY, "vocab_size": 300, "max_position_embeddings": 128}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "Llama": lambda: LlamaConfig(**SHAPE),
    "Qwen 2.5": lambda: Qwen2Config(**SHAPE),
    "Qwen 3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "Gemma 3": lambda: Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=8, layer_types=GEMMAS),
    "Mistral": lambda: MistralConfig(**SHAPE),
    "Phi 3": lambda: Phi3Config(**SHAPE),
    "GPT-2": lambda: GPT2Config(**GPT, n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "GPT-Neo": lambda: GPTNeoConfig(
        **GPT, hidden_size=32, num_layers=2, num_heads=4, attention_types=NEOS, window_size=8
    ),
    "OPT": lambda: OPTConfig(**OPTS),
    "BERT": lambda: BertConfig(**ENCODER),
    "RoBERTa": lambda: RobertaConfig(**ENCODER, pad_token_id=1),
    "DeBERTa v2": lambda: DebertaV2Config(
        **ENCODER, relative_attention=True, position_buckets=8, pos_att_type=["c2p", "p2c"], pooler_hidden_size=32
    ),
    "ModernBERT": lambda: ModernBertConfig(**ENCODER, local_attention=8, pad_token_id=0),
    "T5": lambda: T5Config(**T5),
    "BART": lambda: BartConfig(**BART),
}
GEMMAS = ["sliding_attention", "full_attention"]
NEOS = [[["global", "local"], 1]]
OPTS: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "init_std": 0.2,
}
PROMPTS = [[7, 8, 9, 10, 11], [12, 13], [7, 8, 9, 10, 11]]
LENGTH = 6
"""Number of completions."""


def made(name: str) -> tuple[Backbone, PreTrainedModel]:
    """Return a model of a family with random weights."""
    backbone = backbone_of(FAMILIES[name]())
    backbone.prepare(name)
    torch.manual_seed(0)
    lm = backbone.new_model(torch.float32)
    backbone.check(lm, name)
    return backbone, lm.eval()


def opened(name: str) -> tuple[SharedBase, Backbone, PreTrainedModel]:
    """Return all roles on a model of a family."""
    backbone, lm = made(name)
    roles = SharedBase(lora(lm, 2, 4))
    roles.add(Role.REWARD, head=True)
    if backbone.refusal("generation", name) is None:
        roles.add(Role.SFT)
        roles.add(Role.POLICY, copy_of=Role.SFT)
        roles.add(Role.CRITIC, head=True)
    return roles.eval(), backbone, lm


def learns(roles: SharedBase, role: Role, loss: Callable[[], torch.Tensor]) -> None:
    """Check that a few updates of a role lower its loss and change no other role's parameters."""
    others = [one for other in roles.roles - {Role.BASE, role} for one in roles.parameters_of(other)]
    before = [parameter.detach().clone() for parameter in others]
    optimizer = torch.optim.AdamW(roles.train_only(role), lr=0.01)
    first = loss()
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(loss().detach()) < float(first.detach())
    assert all(torch.equal(parameter, old) for parameter, old in zip(others, before, strict=True))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_role_computes_and_learns_and_the_base_stays(name: str) -> None:
    roles, backbone, lm = opened(name)
    loaded = roles.base_sha256()
    prompts = [[*prompt, START] if backbone.encodes_prompts else prompt for prompt in PROMPTS]
    rows = [[*prompt, *range(20, 20 + length)] for prompt, length in zip(prompts, (3, 6, 2), strict=True)]
    ids_BL, mask_BL = left_pad(rows, 0, torch.device("cpu"))
    wanted_B = torch.tensor([1.0, 0.0, 1.0])

    def reward_loss() -> torch.Tensor:
        scores_B = roles(Role.REWARD, ids_BL, mask_BL, head=Role.REWARD).scores_B
        return torch.nn.functional.binary_cross_entropy_with_logits(scores_B, wanted_B)

    learns(roles, Role.REWARD, reward_loss)
    if Role.POLICY in roles.roles:
        generates(roles, prompts)
    assert roles.base_sha256() == loaded
    roles.adapter.remove()
    assert weights_sha256(lm) == loaded


def generates(roles: SharedBase, prompts: list[list[int]]) -> None:
    """Check sampling against a forward pass; train policy, SFT policy and critic on the completions."""
    sampling = Sampling(LENGTH, 1.0, (), pad_id=0, prompts_at_once=2)
    samples = LocalSampler(roles).draw(Role.POLICY, prompts, sampling, torch.Generator().manual_seed(0))

    def read(role: Role, **what: Any) -> Outputs:
        return roles(role, samples.ids_BL, samples.mask_BL, completion_length=LENGTH, **what)  # type: ignore[no-any-return]

    with torch.no_grad():
        log_probs_BT = read(Role.POLICY, temperature=1.0).log_probs_BT
    torch.testing.assert_close(log_probs_BT, samples.sampler_log_probs_BT, rtol=0, atol=1e-4)

    def negative(role: Role) -> torch.Tensor:
        log_probs_BT = read(role, temperature=1.0).log_probs_BT
        assert log_probs_BT is not None
        return -log_probs_BT.mean()

    def value_loss() -> torch.Tensor:
        values_BT = read(Role.CRITIC, head=Role.CRITIC).values_BT
        assert values_BT is not None
        return (values_BT - 1.0).square().mean()

    learns(roles, Role.SFT, lambda: negative(Role.SFT))
    learns(roles, Role.POLICY, lambda: negative(Role.POLICY))
    learns(roles, Role.CRITIC, value_loss)


def row_of(name: str) -> list[str]:
    """Return a family's row in the table of supported uses."""
    backbone, lm = made(name)
    writes = backbone.refusal("generation", name) is None
    once = backbone.encodes_prompts or (
        writes and shared_prompts.unsupported_reason(backbone, lm, PROMPTS[0], LENGTH) is None
    )
    split = split_layers.unsupported_reason(backbone, lm, 1) is None
    marks = [writes, True, writes, once, split]
    kind = backbone.kind.removeprefix("a ").removeprefix("an ")
    return [name, f"`{backbone.config.model_type}`", kind, *("yes" if mark else "no" for mark in marks)]


def test_the_table_in_the_docs_is_what_they_are_fit_for() -> None:
    written = re.findall(r"^\| (.*) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    rows = [row.split(" | ") for row in written]
    expected = [row_of(name) for name in FAMILIES]
    table = "\n".join(f"| {' | '.join(row)} |" for row in expected)
    assert [row for row in rows if row[0] in FAMILIES] == expected, table
