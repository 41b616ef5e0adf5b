"""All chat templates that TRL ships, on a byte-level BPE with their special tokens."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import PreTrainedTokenizerFast

from perl.backbones.chat import ChatFormat
from perl.data.records import Turn
from perl.errors import UserError
from perl.roles.export_formats import scoring_tokenizer
from tests.conftest import make_tokenizer

FILES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
SPECIAL = re.compile(r"<[|｜]?[\w▁/]+[|｜]?>|\[/?INST\]|\[gMASK\]")
FRAME = ("<s>", "</s>", "<pad>")

SINGLE = [Turn("user", "A latte, please."), Turn("agent", "One latte. What size?")]
THREE_TURNS = [
    *SINGLE,
    Turn("user", "Large."),
    Turn("agent", "Milk?"),
    Turn("user", "Yes, please."),
    Turn("agent", "It is 4 euros."),
]
NO_SYSTEM = {"gemma", "gemma_training"}
OPEN_THOUGHTS = re.compile("deepseek|nemotron")
"""Templates whose prompts open reasoning that finished dialogues omit or write differently."""
OWN_ROWS = re.compile("deepseek|nemotron|gptoss|^qwen3$|qwen3_5_(no)?think$|qwen3_6$")
"""Templates that write earlier answers differently from the last one."""
NO_TOOLS = {
    *("cohere", "cohere_training", "cohere2", "cohere2_training", "gemma", "gemma_training", "gemma3"),
    *("gemma3_training", "gptoss", "gptoss_training", "llava_next", "llava_next_training"),
}
TOOLS_LEFT_OUT = {
    *("phi3", "phi3_training", "phi3_5", "phi3_5_training", "diffusion_gemma", "diffusion_gemma_training"),
    *("gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5"),
}


def tokenizer_of(file: Path) -> PreTrainedTokenizerFast:
    """Return a tokenizer with this template and the special tokens that occur in it."""
    template = file.read_text(encoding="utf-8")
    tokenizer = make_tokenizer(list(FRAME), template, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    found = sorted(set(SPECIAL.findall(template)) - set(FRAME))
    tokenizer.add_tokens([token for token in found if "think" not in token], special_tokens=True)
    tokenizer.add_tokens([token for token in found if "think" in token])
    return tokenizer


@pytest.fixture(params=FILES, ids=lambda file: file.stem, scope="module")
def named(request: pytest.FixtureRequest) -> tuple[str, ChatFormat]:
    return request.param.stem, ChatFormat(tokenizer_of(request.param))


def sent(chat: ChatFormat, turns: Sequence[Turn], **options: Any) -> list[int]:
    """Return the tokens that a server makes of a dialogue."""
    messages = chat.template.messages(turns)
    return list(chat.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options))


def test_there_are_as_many_templates_as_ever() -> None:
    assert len(FILES) >= 34


@pytest.mark.parametrize("turns", [SINGLE, THREE_TURNS], ids=["single", "three turns"])
def test_an_answer_follows_what_a_server_sends(named: tuple[str, ChatFormat], turns: list[Turn]) -> None:
    name, chat = named
    prompt, row = chat.context(turns[:-1]), chat.row(turns[:-1], turns[-1])
    assert prompt == sent(chat, turns[:-1], add_generation_prompt=True)
    assert row.ids[: len(prompt)] == prompt
    assert row.spoken == [False] * len(prompt) + [True] * (len(row.ids) - len(prompt))
    assert row.ids[-1] == chat.end_id
    assert turns[-1].text in chat.tokenizer.decode(row.ids[len(prompt) :])
    if OPEN_THOUGHTS.search(name):
        assert chat.tokenizer.decode(row.ids[len(prompt) :]).startswith("</think>\n\n")
        assert chat.tokenizer.decode(prompt).endswith("<think>\n")
    else:  # GLM has no end token: an answer ends where the next turn begins
        assert sent(chat, turns)[: len(row.ids) - 1] == row.ids[:-1]


def test_a_dialogue_is_one_row_where_earlier_answers_are_written_alike(named: tuple[str, ChatFormat]) -> None:
    name, chat = named
    rows = chat.rows(THREE_TURNS[:1], THREE_TURNS[1:])
    alone = [chat.row(THREE_TURNS[:end], THREE_TURNS[end]) for end in (1, 3, 5)]
    assert (rows == alone) == bool(OWN_ROWS.search(name)) == (len(rows) > 1)
    learned = [token for row in rows for token, said in zip(row.ids, row.spoken, strict=True) if said]
    assert learned == [token for row in alone for token in row.ids[row.prompt_length() :]]
    assert rows[-1].ids == alone[-1].ids


def test_reasoning_is_learned_where_it_is_said(named: tuple[str, ChatFormat]) -> None:
    _, chat = named
    said = Turn("agent", "<think>\nIt is small.\n</think>\n\nOne latte.")
    row = chat.row(SINGLE[:1], said)
    learned = chat.tokenizer.decode(row.ids[row.prompt_length() :])
    assert "It is small." in learned
    assert "One latte." in learned
    whole = chat.tokenizer.decode(row.ids)
    assert whole.count("It is small.") == 1


def test_reasoning_of_earlier_answers_is_as_the_template_has_it(named: tuple[str, ChatFormat]) -> None:
    """Many templates drop it; then neither a server's prompts nor the training rows have it."""
    _, chat = named
    earlier = Turn("agent", "<think>\nIt is small.\n</think>\n\nOne latte.")
    turns = [SINGLE[0], earlier, *THREE_TURNS[2:4]]
    prompt, rows = chat.context(turns[:-1]), chat.rows(turns[:1], turns[1:])
    assert prompt == sent(chat, turns[:-1], add_generation_prompt=True)
    assert rows[-1].ids == chat.row(turns[:-1], turns[-1]).ids
    assert rows[-1].ids[: len(prompt)] == prompt
    learned = [
        chat.tokenizer.decode([t for t, said in zip(row.ids, row.spoken, strict=True) if said]) for row in rows
    ]
    assert sum(text.count("It is small.") for text in learned) == 1


def test_a_system_turn_is_written_or_refused_by_name(named: tuple[str, ChatFormat]) -> None:
    name, chat = named
    turns = [Turn("system", "Be kind."), *SINGLE]
    if name in NO_SYSTEM:
        with pytest.raises(UserError, match="refuses a dialogue of system, user: System role not supported"):
            chat.context(turns[:-1])
        with pytest.raises(UserError, match="refuses a dialogue of system, user"):
            chat.probe({"system", "user", "agent"})
    else:
        assert "Be kind." in chat.tokenizer.decode(chat.row(turns[:-1], turns[-1]).ids)


def test_the_probe_finds_what_is_sent_and_says_what_differs(named: tuple[str, ChatFormat]) -> None:
    name, chat = named
    notes = chat.probe({"user", "agent"})
    assert len(notes) == bool(OPEN_THOUGHTS.search(name))
    for note in notes:
        assert "<think>" in note
        assert "as a server generates them" in note


def test_turns_of_an_api_are_written_or_refused_by_name(named: tuple[str, ChatFormat]) -> None:
    name, chat = named
    if name in NO_TOOLS:
        with pytest.raises(UserError, match="refuses a dialogue of user, agent, api"):
            chat.probe({"user", "agent", "api"})
    elif name in TOOLS_LEFT_OUT:
        with pytest.raises(UserError, match=r"omits what api says \(its role 'tool'\)"):
            chat.probe({"user", "agent", "api"})
    else:
        chat.probe({"user", "agent", "api"})


@pytest.mark.parametrize("turns", [SINGLE, THREE_TURNS], ids=["single", "three turns"])
def test_an_exported_reward_model_reads_the_rows_it_was_trained_on(
    named: tuple[str, ChatFormat], turns: list[Turn]
) -> None:
    _, chat = named
    tokenizer, messages = scoring_tokenizer(chat), chat.template.messages(turns)
    read = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert read == chat.row(turns[:-1], turns[-1]).ids
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert prompt == chat.context(turns[:-1])
