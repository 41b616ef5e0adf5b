"""The boundary of prompt and answer in tokens: SentencePiece-like and slow tokenizers, merges across it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from perl.backbones.chat import ChatFormat
from perl.backbones.tokens import RowTokenizer, Tokens
from perl.data.records import Turn
from tests.conftest import CHATML, WORDS

ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
QWEN3_5 = (Path(trl.__file__).parent / "chat_templates" / "qwen3_5_think.jinja").read_text(encoding="utf-8")
LINES = ["a\n\nb\n\nc", "\n\n", "yes\n\nno", "one\n\ntwo"]
"""Texts from which a tokenizer learns to merge two line breaks into one token."""
TURNS = [
    Turn("user", "A latte, please."),
    Turn("agent", "What size would you like?"),
    Turn("user", "Large."),
    Turn("agent", "yes, no, thank you"),
]


def trained(tokenizer: Tokenizer, template: str, alphabet: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator((WORDS + LINES) * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def metaspace(scheme: str, template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer in today's SentencePiece format: with a space before the first piece, or before each."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return trained(tokenizer, template, ["\n", *map(chr, range(33, 127))])


def llama(template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer like those of Llama 2, TinyLlama and Zephyr, whose normalizer adds the space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return trained(tokenizer, template, ["\n", "▁", *map(chr, range(33, 127))])


def byte_level(template: str, prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer like GPT-2's and Qwen's, including their merge of two line breaks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    made = trained(tokenizer, template, pre_tokenizers.ByteLevel.alphabet())
    made.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    assert len(made("a\n\n", add_special_tokens=False)["input_ids"]) == 2
    return made


def slow(template: str) -> PreTrainedTokenizerBase:
    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = template
    assert not tokenizer.is_fast
    return tokenizer


MAKERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "metaspace, first, Zephyr": lambda: metaspace("first", ZEPHYR),
    "metaspace, always, Zephyr": lambda: metaspace("always", ZEPHYR),
    "metaspace, first, Mistral": lambda: metaspace("first", MISTRAL),
    "Llama, Zephyr": lambda: llama(ZEPHYR),
    "Llama, Mistral": lambda: llama(MISTRAL),
    "Llama, ChatML": lambda: llama(CHATML),
    "bytes, ChatML": lambda: byte_level(CHATML),
    "bytes, prefix space, Zephyr": lambda: byte_level(ZEPHYR, prefix_space=True),
    "slow, ChatML": lambda: slow(CHATML),
    "slow, Zephyr": lambda: slow(ZEPHYR),
}


@pytest.fixture(params=MAKERS, scope="module")
def chat(request: pytest.FixtureRequest) -> ChatFormat:
    return ChatFormat(MAKERS[request.param]())


def sent(chat: ChatFormat, turns: Sequence[Turn], asks: bool = False) -> list[int]:
    """Return the tokens that a server makes of a dialogue."""
    messages = chat.template.messages(turns)
    return list(
        chat.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=asks)
    )


def test_rows_are_what_a_server_sends(chat: ChatFormat) -> None:
    (row,) = chat.rows(TURNS[:1], TURNS[1:])
    assert row.ids == sent(chat, TURNS)[: len(row.ids)]
    for end in (1, 3):
        prompt, alone = chat.context(TURNS[:end]), chat.row(TURNS[:end], TURNS[end])
        assert prompt == sent(chat, TURNS[:end], asks=True)
        assert alone.ids == [*prompt, *chat.completion(TURNS[:end], TURNS[end])] == row.ids[: len(alone.ids)]
        assert alone.ids == sent(chat, TURNS[: end + 1])[: len(alone.ids)]
        assert row.spoken[len(prompt) : len(alone.ids)] == [True] * (len(alone.ids) - len(prompt))
    assert sum(row.spoken) == sum(len(chat.completion(TURNS[:end], TURNS[end])) for end in (1, 3))
    assert chat.probe({"user", "agent"}) == []


def test_text_gains_no_space_where_it_goes_on(chat: ChatFormat) -> None:
    row = chat.row([Turn("text", "A latte, please. Lar")], Turn("text", "ge. yes"))
    prompt = chat.context([Turn("text", "A latte, please. Lar")])
    assert row.ids[: len(prompt)] == prompt
    said = chat.tokenizer.decode(row.ids, skip_special_tokens=True).strip()
    assert said == "A latte, please. Large. yes"


@pytest.mark.parametrize("make", [byte_level, lambda template: slow(template)], ids=["fast", "slow"])
def test_what_would_merge_across_the_cut_stays_apart(make: Callable[[str], PreTrainedTokenizerBase]) -> None:
    """Qwen3.5's prompt ends in a line break, and its answer without thoughts begins with one."""
    chat = ChatFormat(make(QWEN3_5))
    prompt, row = chat.context(TURNS[:1]), chat.row(TURNS[:1], TURNS[1])
    assert chat.template.prompt(TURNS[:1]).endswith("<think>\n")
    assert row.ids[: len(prompt)] == prompt == sent(chat, TURNS[:1], asks=True)
    answer = chat.tokenizer.convert_ids_to_tokens(row.ids[len(prompt) :])
    assert answer[0] == chat.tokenizer.convert_ids_to_tokens(prompt[-1:])[0], "a line break of its own"
    whole = sent(chat, TURNS[:2])
    if chat.tokenizer.is_fast:
        assert row.ids != whole[: len(row.ids)], "tokenized in one go they merge"
        assert len(chat.probe({"user", "agent"})) == 1
    assert chat.tokenizer.decode(row.ids) == chat.tokenizer.decode(whole[:-1])


def test_the_prompt_keeps_its_own_tokens_where_what_follows_would_change_them() -> None:
    """GPT-2 splits line breaks before a word differently from those at the end of a text."""
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n\n{% endif %}").replace(
        "{{ m.role }}\n", "{{ m.role }}\n\n"
    )
    chat = ChatFormat(byte_level(template))
    prompt, row = chat.context(TURNS[:1]), chat.row(TURNS[:1], TURNS[1])
    assert chat.tokenizer.convert_ids_to_tokens(prompt[-1:]) == ["ĊĊ"]
    assert row.ids[: len(prompt)] == prompt
    assert row.ids != sent(chat, TURNS[:2])[: len(row.ids)]
    assert len(chat.probe({"user", "agent"})) == 1
    first, second = chat.row(TURNS[:1], TURNS[1]), chat.row(TURNS[:3], TURNS[3])
    assert chat.rows(TURNS[:1], TURNS[1:]) == [first, second], "their context is otherwise tokenized as history"


@given(st.lists(st.text("aA.\n <>|é😀_", max_size=12), min_size=3, max_size=3))
def test_any_words_follow_their_prompt(words: list[str]) -> None:
    turns = [Turn("user", words[0]), Turn("agent", words[1]), Turn("user", words[2])]
    for chat in (BYTES, SPACES):
        prompt, row = chat.context(turns), chat.row(turns, Turn("agent", words[1]))
        assert row.ids[: len(prompt)] == prompt
        assert row.ids[-1] == chat.end_id
        (learned,) = chat.rows(turns[:1], [turns[1]])
        assert learned.ids[: len(chat.context(turns[:1]))] == chat.context(turns[:1])
        if chat is BYTES:
            assert chat.tokenizer.decode(row.ids) == "".join(chat.template.row([*turns, Turn("agent", words[1])]))


BYTES, SPACES = ChatFormat(byte_level(CHATML)), ChatFormat(llama(ZEPHYR))


def test_a_dialogue_in_one_go_is_what_it_is_one_by_one(chat: ChatFormat) -> None:
    """The fast path with offsets equals tokenizing every prompt and answer separately."""
    rows = RowTokenizer(chat.tokenizer, chat.template.end)
    pairs = [chat.template.row(TURNS[:end]) for end in (2, 4)]
    (expected,) = rows._one_by_one(pairs)
    found = rows._at_once(pairs)
    assert found == (expected if chat.tokenizer.is_fast else None)
    assert rows.rows(pairs) == [expected] == [Tokens(expected.ids, expected.spoken)]
