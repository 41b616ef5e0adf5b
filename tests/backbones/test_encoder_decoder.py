"""Encoder-decoders equal those of transformers, in every role and with any padding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from perl.backbones import EncoderDecoder, backbone_of
from perl.backbones.base import Base
from perl.backbones.encoder_decoder_format import START
from perl.backbones.loading import load_base, random_base
from perl.backbones.padding import joined, left_pad
from perl.data.records import Turn
from perl.errors import UserError
from perl.rl.samplers.base import Samples, Sampling
from perl.rl.samplers.local import LocalSampler
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from tests.encoder_decoders import MAKERS, T5, UNEVEN, tiny_bart, tiny_t5
from tests.tiny import KINDS, adapter_of_kind, lora

CPU = torch.device("cpu")
CONTEXT = [Turn("user", "A latte, please."), Turn("agent", "What size?"), Turn("user", "Large.")]
ANSWERS = [Turn("agent", "Large it is."), Turn("agent", "No.")]
SHORT = [Turn("user", "Tea?")]


def opened(folder: Path, **settings: Any) -> tuple[Base, SharedBase]:
    """Return a base with a policy and a reward model whose adapters are not in their initial state."""
    base, lm = load_base(str(folder), torch.float32, CPU)
    torch.manual_seed(0)
    roles = SharedBase(lora(lm, 2, 4, **settings))
    roles.add(Role.POLICY)
    roles.add(Role.REWARD, head=True)
    generator = torch.Generator().manual_seed(1)
    for parameter in roles.parameters_of(Role.POLICY, Role.REWARD):
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return base, roles.eval()


def rows_of(base: Base) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts of several lengths, two of them equal, and their completions."""
    rows = [base.chat.row(context, answer) for context in (CONTEXT, SHORT) for answer in ANSWERS]
    cut = [row.prompt_length() for row in rows]
    return (
        [row.ids[:at] for row, at in zip(rows, cut, strict=True)],
        [row.ids[at:] for row, at in zip(rows, cut, strict=True)],
    )


def own_inputs(base: Base, prompt: list[int], completion: list[int]) -> dict[str, torch.Tensor]:
    """Return transformers' inputs for a row: the encoder's ids, and labels with the tokenizer's prefix."""
    at = prompt.index(START)
    return {
        "input_ids": torch.tensor([prompt[:at]]),
        "labels": torch.tensor([[*prompt[at + 1 :], *completion]]),
    }


@pytest.fixture(params=list(MAKERS))
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Base, SharedBase]:
    return opened(MAKERS[request.param](tmp_path, **UNEVEN[request.param]))


@torch.no_grad()
def test_log_probs_are_those_of_transformers_with_labels(tiny: tuple[Base, SharedBase]) -> None:
    base, roles = tiny
    prompts, completions = rows_of(base)
    ids_BL, mask_BL = joined(prompts, completions, base.chat.pad_id, CPU)
    length = max(map(len, completions))
    found = roles(Role.POLICY, ids_BL, mask_BL, completion_length=length, temperature=1.0).log_probs_BT
    with roles.role(Role.POLICY):
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            inputs, own = own_inputs(base, prompt, completion), len(completion)
            logits_TV = roles.lm(**inputs).logits[0, -own:]
            expected_T = logits_TV.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
            torch.testing.assert_close(found[row, :own], expected_T, rtol=0, atol=1e-5)
            assert not found[row, own:].any()
    assert found.std() > 0.1


def test_a_text_is_what_its_tokenizer_makes_of_it(tmp_path: Path) -> None:
    for name, maker in MAKERS.items():
        base, _ = load_base(str(maker(tmp_path / name)), torch.float32, CPU)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        first = list(base.chat.first_ids)
        assert len(first) == (name == "bart")
        context, answer = Turn("text", "a latte?"), Turn("text", " one latte.")
        row = base.chat.row([context], answer)
        source, target = tokenizer("a latte?")["input_ids"], tokenizer("one latte.")["input_ids"]
        assert row.ids == [*source, START, *target]
        assert sum(row.spoken) == len(target) - len(first)
        rendered = base.chat.template.prompt(CONTEXT)
        assert base.chat.context(CONTEXT) == [*tokenizer(rendered)["input_ids"], START, *first]
        assert base.chat.completion(CONTEXT, ANSWERS[0]) == tokenizer("Large it is.")["input_ids"][len(first) :]


def test_rows_keep_their_frame_and_their_answer_when_they_are_cut(tmp_path: Path) -> None:
    base, _ = load_base(str(tiny_bart(tmp_path)), torch.float32, CPU)
    whole, answer = base.chat.row(CONTEXT, ANSWERS[0]), base.chat.completion(CONTEXT, ANSWERS[0])
    assert not whole.cut
    newest = base.chat.row(CONTEXT[2:], ANSWERS[0])
    for length in (len(whole.ids) - 1, len(newest.ids), len(answer) + 8, len(answer) + 6, 8):
        cut = base.chat.row(CONTEXT, ANSWERS[0], length)
        assert cut.cut
        assert len(cut.ids) <= length
        at = cut.ids.index(START)
        assert (cut.ids[0], *cut.ids[at - 1 : at + 2]) == (0, 2, START, 0)
        kept = cut.ids[cut.prompt_length() :]
        assert kept == answer[-len(kept) :]
        assert len(kept) == len(answer) or length == 8
    assert base.chat.row(CONTEXT, ANSWERS[0], len(newest.ids)).ids == newest.ids  # whole turns go first
    ours = base.chat.context(CONTEXT, 20)
    assert len(ours) <= 20
    assert ours[-3:] == [2, START, 0]


def test_each_answer_of_a_dialogue_is_a_row(tmp_path: Path) -> None:
    base, _ = load_base(str(tiny_t5(tmp_path)), torch.float32, CPU)
    rows = base.chat.rows(CONTEXT[:1], [*CONTEXT[1:], ANSWERS[0]])
    assert [row.ids for row in rows] == [
        base.chat.row(CONTEXT[:1], CONTEXT[1]).ids,
        base.chat.row(CONTEXT, ANSWERS[0]).ids,
    ]
    (first,) = base.chat.rows((), [Turn("agent", "Hello.")])  # the agent speaks first
    assert first.ids[first.prompt_length() :] == base.chat.completion(SHORT, Turn("agent", "Hello."))
    short = base.chat.rows(CONTEXT, [ANSWERS[0]], 9)[0]
    assert len(short.ids) == 9
    assert (
        short.ids[short.prompt_length() :] == base.chat.completion(SHORT, ANSWERS[0])[: 9 - short.prompt_length()]
    )


@torch.no_grad()
def test_scores_are_the_heads_on_the_decoders_last_token(tiny: tuple[Base, SharedBase]) -> None:
    base, roles = tiny
    prompts, completions = rows_of(base)
    both = list(zip(prompts, completions, strict=True))
    rows = [[*prompt, *completion] for prompt, completion in both]
    scores = roles(Role.REWARD, *left_pad(rows, base.chat.pad_id, CPU), head=Role.REWARD).scores_B
    by_columns = roles(
        Role.REWARD, *joined(prompts, completions, base.chat.pad_id, CPU), head=Role.REWARD
    ).scores_B
    with roles.role(Role.REWARD):
        for row, (prompt, completion) in enumerate(both):
            at = prompt.index(START)
            written = torch.tensor([[roles.lm.config.decoder_start_token_id, *prompt[at + 1 :], *completion]])
            outputs = roles.lm(
                input_ids=torch.tensor([prompt[:at]]), decoder_input_ids=written, output_hidden_states=True
            )
            score = roles.head(Role.REWARD)(outputs.decoder_hidden_states[-1][0, -1])
            torch.testing.assert_close(scores[row : row + 1], score, rtol=0, atol=1e-5)
    torch.testing.assert_close(by_columns, scores, rtol=0, atol=1e-5)
    assert scores.std() > 1e-2


def drawn(roles: SharedBase, prompts: list[list[int]], end_ids: tuple[int, ...], temperature: float) -> Samples:
    sampling = Sampling(12, temperature, end_ids, pad_id=1, prompts_at_once=1)
    return LocalSampler(roles).draw(Role.POLICY, prompts, sampling, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", list(MAKERS))
@torch.no_grad()
def test_greedy_sampling_is_that_of_generate(name: str, tmp_path: Path) -> None:
    base, roles = opened(MAKERS[name](tmp_path))  # transformers' cache fails where the decoder is the deeper part
    prompts, _ = rows_of(base)
    roles.lm.get_input_embeddings().weight *= 0.1  # else T5 repeats its last token
    samples = drawn(roles, prompts, base.chat.end_ids, temperature=1e-6)
    first = {"forced_bos_token_id": base.chat.first_ids[0]} if base.chat.first_ids else {}
    settings = GenerationConfig(
        max_new_tokens=12 + len(base.chat.first_ids),
        eos_token_id=list(base.chat.end_ids),
        pad_token_id=base.chat.pad_id,
        decoder_start_token_id=roles.lm.config.decoder_start_token_id,
        **first,
    )
    roles.lm.generation_config = GenerationConfig()
    completions = samples.completions()
    with roles.role(Role.POLICY):
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = torch.tensor([prompt[: prompt.index(START)]])
            written = roles.lm.generate(input_ids=ids, generation_config=settings)[0].tolist()
            assert written[1 + len(base.chat.first_ids) :] == completion
    assert len(set(map(tuple, completions))) > 1


@torch.no_grad()
def test_what_is_sampled_is_what_a_pass_says_and_the_encoder_reads_each_prompt_once(
    tiny: tuple[Base, SharedBase],
) -> None:
    base, roles = tiny
    prompts, _ = rows_of(base)
    encoded: list[int] = []
    hook = roles.lm.get_encoder().register_forward_hook(lambda *call: encoded.append(len(call[-1][0])))
    samples = drawn(roles, prompts, base.chat.end_ids, temperature=1.0)
    assert encoded == [1, 1]  # four completions, of two prompts, in two parts
    outputs = roles(
        Role.POLICY, samples.ids_BL, samples.mask_BL, completion_length=samples.completion_length, temperature=1.0
    )
    assert encoded == [1, 1, 2]
    hook.remove()
    torch.testing.assert_close(outputs.log_probs_BT, samples.sampler_log_probs_BT, rtol=0, atol=1e-5)


def test_gradients_reach_the_adapters_of_both_parts_and_not_the_base(tiny: tuple[Base, SharedBase]) -> None:
    base, roles = tiny
    prompts, completions = rows_of(base)
    trained = roles.train_only(Role.POLICY)
    ids_BL, mask_BL = joined(prompts, completions, base.chat.pad_id, CPU)
    with roles.checkpointed():
        length = max(map(len, completions))
        roles(
            Role.POLICY, ids_BL, mask_BL, completion_length=length, temperature=1.0
        ).log_probs_BT.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)
    assert {name.partition("coder.")[0][-2:] for name in roles.weights(Role.POLICY)} == {"en", "de"}
    assert roles.base_sha256() == base.sha256


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora"])
@pytest.mark.parametrize("name", list(MAKERS))
def test_adapters_of_every_kind_change_both_parts_or_are_refused(name: str, kind: str, tmp_path: Path) -> None:
    base, lm = load_base(str(MAKERS[name](tmp_path)), torch.float32, CPU)
    refused = {("t5", "prefix"), ("t5", "series"), ("t5", "parallel"), ("bart", "series"), ("bart", "parallel")}
    if (name, kind) in refused:
        with pytest.raises(UserError, match=r"blocks have no part 'mlp'|does not support prefixes"):
            adapter_of_kind(lm, kind)
        return
    roles = SharedBase(adapter_of_kind(lm, kind))
    roles.add(Role.POLICY)
    prompts, completions = rows_of(base)
    ids_BL, mask_BL = joined(prompts, completions, base.chat.pad_id, CPU)
    trained = roles.train_only(Role.POLICY)

    def log_probs(role: Role) -> torch.Tensor:
        outputs = roles(role, ids_BL, mask_BL, completion_length=max(map(len, completions)), temperature=1.0)
        assert outputs.log_probs_BT is not None
        return outputs.log_probs_BT

    torch.testing.assert_close(log_probs(Role.POLICY), log_probs(Role.BASE), rtol=0, atol=1e-5)
    before = {name: parameter.detach().clone() for name, parameter in roles.weights(Role.POLICY).items()}
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(2):
        (-log_probs(Role.POLICY).sum()).backward()
        optimizer.step()
    moved = {name for name, parameter in roles.weights(Role.POLICY).items() if not parameter.equal(before[name])}
    of = {name.partition("coder.")[0][-2:] for name in moved}
    assert of == {"en", "de"} if kind != "tinylora" else of == {"en"}  # it has one vector for all layers
    assert roles.base_sha256() == base.sha256


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", list(MAKERS))
def test_going_on_from_the_encoders_lower_blocks_changes_no_result(
    name: str, checkpointed: bool, tmp_path: Path
) -> None:
    deeper = {"t5": "num_layers", "bart": "encoder_layers"}[name]
    base, roles = opened(MAKERS[name](tmp_path, **{deeper: 3}), layers=[1, 2])
    assert roles.shared_blocks == 1
    ids_BL, mask_BL = joined(*(rows := rows_of(base)), base.chat.pad_id, CPU)
    lower_hidden_BLD, length = roles.lower_hidden(ids_BL, mask_BL), max(map(len, rows[1]))
    trained, computed = roles.train_only(Role.POLICY, Role.REWARD), list[int]()
    for index, block in enumerate(roles.backbone.blocks(roles.lm)):
        block.register_forward_hook(lambda *_, index=index: computed.append(index))

    def read(**lower: torch.Tensor) -> list[torch.Tensor]:
        computed.clear()
        with roles.checkpointed(checkpointed):
            log_probs_BT = roles(
                Role.POLICY, ids_BL, mask_BL, completion_length=length, temperature=1.0, **lower
            ).log_probs_BT
            scores_B = roles(Role.REWARD, ids_BL, mask_BL, head=Role.REWARD, **lower).scores_B
            (log_probs_BT.sum() + scores_B.sum()).backward()
        gradients = [parameter.grad for parameter in trained]
        roles.zero_grad()
        return [log_probs_BT.detach(), scores_B.detach(), *gradients]

    whole = read()
    assert set(computed) == set(range(len(roles.backbone.blocks(roles.lm))))
    split = read(lower_hidden_BLD=lower_hidden_BLD)
    assert min(computed) == 1
    for got, want in zip(split, whole, strict=True):
        assert want.abs().sum() > 0
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_an_encoder_without_adapters_is_not_split(tmp_path: Path) -> None:
    _, roles = opened(tiny_t5(tmp_path, num_decoder_layers=3), layers=[2])
    assert roles.shared_blocks == 0
    assert roles.split_unsupported_reason == "T5ForConditionalGeneration has no adapter in its encoder"


def test_a_merged_model_and_an_untied_one_compute_alike_when_they_are_loaded_again(tmp_path: Path) -> None:
    base, roles = opened(tiny_t5(tmp_path / "base", tie_word_embeddings=False, feed_forward_proj="gated-gelu"))
    inputs = own_inputs(base, *(one[0] for one in rows_of(base)))
    roles.lm.save_pretrained(tmp_path / "again")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again")
    assert not again.config.scale_decoder_outputs
    backbone_of(again.config).check(again, "again")
    assert again(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_start_token_id": None}, "the decoder has no start token"),
        ({"architectures": ["T5Model"]}, "not a causal LM but T5Model"),
    ],
)
def test_what_cannot_write_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        random_base({"model_type": "t5", **T5, **changes}, torch.float32, CPU, seed=0)


def test_other_encoder_decoders_are_refused() -> None:
    backbone = backbone_of(AutoConfig.for_model("pegasus"))
    assert isinstance(backbone, EncoderDecoder)
    with pytest.raises(UserError, match="of the unsupported type pegasus"):
        backbone.prepare("base.model")


@pytest.mark.parametrize("use", ["4bit", "sharding"])
def test_uses_that_it_is_not_fit_for_are_refused_with_the_reason(use: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is an encoder-decoder"):
        backbone_of(AutoConfig.for_model("t5")).require(use, "there")
