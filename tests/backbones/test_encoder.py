"""Encoders: which models are encoders, how rows are truncated, and scores equal to those of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from perl.backbones import backbone_of
from perl.backbones.base import weights_sha256
from perl.backbones.encoder import Encoder, EncoderFormat
from perl.backbones.loading import load_base
from perl.backbones.padding import left_pad
from perl.backbones.tokens import Tokens
from perl.data.records import Turn
from perl.errors import UserError
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.roles.separate_models import SeparateModels
from perl.roles.shared_base import SharedBase
from tests.encoders import BERT, tiny_bert, tiny_roberta, word_pieces
from tests.tiny import lora

CPU = torch.device("cpu")
CONTEXT = [
    Turn("agent", "welcome."),
    Turn("user", "a latte, please."),
    Turn("agent", "iced?"),
    Turn("user", "no."),
]
ANSWER = Turn("agent", "one latte.")
MAKERS = {"bert": tiny_bert, "roberta": tiny_roberta}


def opened(folder: Path, tuning: str = "lora", dtype: torch.dtype = torch.float32) -> tuple[Any, Roles]:
    """Return a base with a reward role whose scores are not all equal."""
    base, lm = load_base(str(folder), dtype, CPU, generates=False)
    if tuning == "full":
        roles: Roles = SeparateModels(lm, base.load)
    else:
        roles = SharedBase(lora(lm, 2, 4))
    roles.add(Role.REWARD, head=True)
    generator = torch.Generator().manual_seed(1)
    for parameter in roles.parameters_of(Role.REWARD):
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return base, roles.eval()


def scores(roles: Roles, rows: list[list[int]]) -> torch.Tensor:
    outputs = roles(Role.REWARD, *left_pad(rows, roles.models()[0].config.pad_token_id, CPU), head=Role.REWARD)
    assert outputs.scores_B is not None
    found: torch.Tensor = outputs.scores_B
    return found


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("bert", {}, True),
        ("roberta", {}, True),
        ("distilbert", {}, True),
        ("modernbert", {}, True),
        ("deberta-v2", {}, True),
        ("bert", {"is_decoder": True}, False),
        ("bert", {"architectures": ["BertLMHeadModel"]}, False),
        ("llama", {}, False),
        ("gpt2", {}, False),
        ("t5", {}, False),
        ("bart", {}, False),
    ],
)
def test_an_encoder_reads_both_ways_and_does_not_write(model_type: str, changes: Any, expected: bool) -> None:
    backbone = backbone_of(AutoConfig.for_model(model_type, **changes))
    assert isinstance(backbone, Encoder) is expected


@pytest.mark.parametrize(
    ("name", "parts", "room"), [("bert", ["bert.pooler", "classifier"], 128), ("roberta", ["classifier"], 128)]
)
def test_the_head_and_the_room_are_the_architectures_own(
    name: str, parts: list[str], room: int, tmp_path: Path
) -> None:
    base, roles = opened(MAKERS[name](tmp_path))
    lm = roles.models()[0]
    assert roles.backbone.head_modules(lm) == parts
    assert roles.backbone.context_length(lm) == base.context_length == room
    longest = [[5] * room, [6] * (room - 3)]
    assert scores(roles, longest).isfinite().all()  # RoBERTa counts positions from 2: 130 of them hold 128 tokens


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("name", list(MAKERS))
def test_scores_are_those_of_transformers_with_the_same_head(name: str, tuning: str, tmp_path: Path) -> None:
    base, roles = opened(MAKERS[name](tmp_path), tuning)
    rows = [base.chat.row(CONTEXT[:1], ANSWER, 64).ids, base.chat.row(CONTEXT, ANSWER, 64).ids, [2, 9, 3]]
    together = scores(roles, rows)
    assert together.std() > 1e-2
    with roles.role(Role.REWARD):
        own = roles.model()
        own = roles.backbone.classifier(own, roles.heads[Role.REWARD], own.config, base.tokenizer)
        alone = torch.stack([own(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_a_new_head_scores_0_and_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    base, lm = load_base(str(tiny_bert(tmp_path)), torch.float32, CPU, generates=False)
    roles = SharedBase(lora(lm, 2, 4))
    roles.add(Role.REWARD, head=True)
    assert scores(roles, [[2, 9, 3]]).item() == 0
    optimizer = torch.optim.SGD(roles.train_only(Role.REWARD), lr=1.0)
    for _ in range(2):  # with a score of 0, only the last layer trains at first
        scores(roles, [[2, 9, 3]]).sum().backward()
        optimizer.step()
    learned = roles.head_weights(Role.REWARD)
    assert all(parameter.grad is not None for parameter in roles.parameters_of(Role.REWARD))
    assert set(learned) == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }
    assert not torch.equal(learned["bert.pooler.dense.weight"], lm.bert.pooler.dense.weight)
    assert roles.base_sha256() == base.sha256 == weights_sha256(base.load())


def test_a_head_learns_in_fp32_on_a_base_of_bf16(tmp_path: Path) -> None:
    base, roles = opened(tiny_bert(tmp_path), dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in roles.parameters_of(Role.REWARD))
    assert roles.models()[0].dtype == torch.bfloat16
    assert scores(roles, [base.chat.row(CONTEXT, ANSWER, 64).ids]).dtype == torch.float32


def test_full_tuning_has_each_weight_once(tmp_path: Path) -> None:
    _, roles = opened(tiny_bert(tmp_path), "full")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    named = {**roles.weights(Role.REWARD), **roles.head_weights(Role.REWARD)}
    assert set(named) == set(dict(whole.named_parameters()))
    assert len(roles.parameters_of(Role.REWARD)) == len(named)


def test_rows_keep_their_first_token_and_their_answer(tmp_path: Path) -> None:
    base, _ = load_base(str(tiny_bert(tmp_path)), torch.float32, CPU, generates=False)
    whole = base.chat.row(CONTEXT, ANSWER, 128).ids
    answer = base.chat.completion(CONTEXT, ANSWER)
    assert whole[0] == base.tokenizer.cls_token_id
    assert whole[-len(answer) :] == answer
    assert answer[-1] == base.tokenizer.sep_token_id
    for start in (1, 3):  # whole turns go first
        newest = base.chat.row(CONTEXT[start:], ANSWER)
        assert base.chat.row(CONTEXT, ANSWER, len(newest.ids)) == Tokens(newest.ids, newest.spoken, cut=True)
    for length in (len(answer) + 3, len(answer) + 1, 1):
        cut = base.chat.row(CONTEXT, ANSWER, length)
        assert len(cut.ids) == max(length, len(answer) + 1)
        assert cut.ids[0] == whole[0]
        assert cut.ids[-len(answer) :] == answer
    assert base.chat.row(CONTEXT, Turn("agent", "a " * 126), 1).ids[0] == whole[0]
    with pytest.raises(UserError, match=r"a completion has 128 tokens; a row may have 128") as caught:
        base.chat.row(CONTEXT, Turn("agent", "a " * 127), 128)
    assert "with a longer context" in str(caught.value)


def test_a_text_has_the_layout_that_its_tokenizer_gives_it(tmp_path: Path) -> None:
    base, _ = load_base(str(tiny_bert(tmp_path)), torch.float32, CPU, generates=False)
    row = base.chat.row([Turn("text", "a latte?")], Turn("text", " one latte."), 128)
    assert row.ids == AutoTokenizer.from_pretrained(tmp_path)("a latte? one latte.")["input_ids"]


@pytest.mark.parametrize("missing", ["cls_token", "sep_token"])
def test_a_tokenizer_without_a_frame_is_refused(missing: str) -> None:
    tokens = {name: token for name, token in BERT.items() if name != missing}
    with pytest.raises(UserError, match=f"the tokenizer has no {missing}") as caught:
        EncoderFormat(word_pieces(tokens), 128)
    assert f"Set {missing}" in str(caught.value)


def test_an_encoder_is_refused_where_something_is_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="BertModel is an encoder: it reads texts bidirectionally") as caught:
        load_base(str(tiny_bert(tmp_path)), torch.float32, CPU)
    assert "only a reward section" in str(caught.value)


def test_4_bit_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="4-bit weights are for causal LMs"):
        load_base(str(tiny_bert(tmp_path)), torch.float32, CPU, generates=False, four_bit=True)


def test_weights_missing_inside_the_blocks_are_refused(tmp_path: Path) -> None:
    file = tiny_bert(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"weights are not in its files, including bert\.encoder"):
        load_base(str(tmp_path), torch.float32, CPU, generates=False)
