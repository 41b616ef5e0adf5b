"""Dialogues that are too long: what is kept, what is cut first, and how it is reported."""

import pytest

from perl.backbones.chat import ChatFormat
from perl.data.records import Turn
from tests.backbones.test_chat import LLAMA_3, chatml, llama_2, llama_3, plain
from tests.conftest import make_tokenizer

SYSTEM = Turn("system", "Be kind.")
LONG = [
    SYSTEM,
    Turn("user", "A latte, please."),
    Turn("agent", "What size?"),
    Turn("user", "Large."),
    Turn("agent", "call find {}"),
    Turn("api", "{}"),
    Turn("agent", "Milk?"),
    Turn("user", "Yes."),
]
ANSWER = Turn("agent", "One latte.")


@pytest.fixture(params=[chatml, llama_2, llama_3, plain], ids=lambda make: make.__name__, scope="module")
def chat(request: pytest.FixtureRequest) -> ChatFormat:
    return ChatFormat(request.param())


def test_whole_turns_go_first_and_the_oldest_of_them(chat: ChatFormat) -> None:
    """A truncated dialogue begins with a user turn, after the system turn."""
    kept = [[SYSTEM, *LONG[start:]] for start in (1, 3, 7)]
    sizes = [len(chat.context(turns)) for turns in kept]
    assert sizes == sorted(sizes, reverse=True)
    for length in range(sizes[-1], sizes[0] + 3):
        longest = next(turns for turns, size in zip(kept, sizes, strict=True) if size <= length)
        assert chat.context(LONG, length) == chat.context(longest)
        row = chat.row(LONG, ANSWER, length + len(chat.completion(LONG, ANSWER)))
        assert (row.ids, row.spoken) == (chat.row(longest, ANSWER).ids, chat.row(longest, ANSWER).spoken)
        assert row.cut == (len(longest) < len(LONG))


def test_a_turn_is_cut_only_where_the_last_ones_alone_are_too_long(chat: ChatFormat) -> None:
    turns = [SYSTEM, Turn("user", "hello"), Turn("agent", "yes"), Turn("user", " ".join(map(str, range(300))))]
    text = chat.tokenizer.decode(chat.context(turns, 60), skip_special_tokens=False)
    whole = chat.tokenizer.decode(chat.context([SYSTEM, turns[-1]]), skip_special_tokens=False)
    before, after = whole.split("0 1 2 3")[0], whole.split("299")[1]
    assert text.startswith(before), "the system's turn and how the user's begins"
    assert text.endswith(f"298 299{after}"), "its newest words, and that an answer is asked for"
    assert 50 < len(chat.context(turns, 60)) <= 60
    assert "hello" not in text


def test_the_system_turn_is_cut_last_and_at_its_end(chat: ChatFormat) -> None:
    turns = [Turn("system", " ".join(map(str, range(200)))), Turn("user", "hello")]
    text = chat.tokenizer.decode(chat.context(turns, 60), skip_special_tokens=False)
    assert "0 1 2 3 4" in text
    assert "199" not in text
    assert "hello" not in text
    assert len(chat.context(turns, 60)) <= 60


def test_of_an_answer_that_is_too_long_its_end_is_scored_and_its_start_learned(chat: ChatFormat) -> None:
    answer = Turn("agent", " ".join(map(str, range(200))))
    whole, row = chat.row([SYSTEM, Turn("user", "hi")], answer), chat.row([SYSTEM, Turn("user", "hi")], answer, 50)
    assert len(row.ids) == 50
    assert row.cut
    assert row.ids[0] == whole.ids[0]
    assert row.ids[1:] == whole.ids[-49:]
    assert row.ids[-1] == chat.end_id
    (learned,) = chat.rows([SYSTEM, Turn("user", "hi")], [answer], 50)
    assert len(learned.ids) == 50
    assert learned.cut
    said = [token for token, spoken in zip(learned.ids, learned.spoken, strict=True) if spoken]
    assert said == chat.completion([Turn("user", "")], answer)[: len(said)]
    assert len(said) > 10


def test_a_demonstration_loses_its_oldest_turns(chat: ChatFormat) -> None:
    answer = [*LONG[2:], ANSWER]
    (whole,) = chat.rows(LONG[:2], answer)
    (row,) = chat.rows(LONG[:2], answer, len(whole.ids) - 1)
    assert row.cut
    assert not whole.cut
    later = [SYSTEM, LONG[3]]
    (expected,) = chat.rows(later, [*LONG[4:], ANSWER])
    assert (row.ids, row.spoken) == (expected.ids, expected.spoken)
    assert chat.rows(LONG[:2], answer, len(whole.ids)) == [whole]


def test_rows_of_a_template_that_rewrites_history_are_cut_one_by_one() -> None:
    """Every answer keeps a row, with as much of its context as fits."""
    template = LLAMA_3.replace("{{ m.content | trim }}", "{{ '' if loop.last else '~' }}{{ m.content | trim }}")
    special = ["<|begin|>", "<|end|>", "<|start|>", "<|mid|>", "<|eot|>"]
    chat = ChatFormat(make_tokenizer(special, template, bos_token="<|begin|>", eos_token="<|end|>"))
    answer = [*LONG[2:], ANSWER]
    rows = chat.rows(LONG[:2], answer)
    assert len(rows) == 4
    length = len(rows[-1].ids) - 1
    cut = chat.rows(LONG[:2], answer, length)
    assert [row.cut for row in cut] == [False, False, False, True]
    assert cut[:3] == rows[:3]
    assert cut[-1].ids == chat.row([SYSTEM, *LONG[3:]], ANSWER).ids


def test_plain_text_keeps_what_it_begins_with_and_its_newest_words() -> None:
    from tokenizers import processors

    tokenizer = llama_2()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    chat = ChatFormat(tokenizer)
    context, answer = (Turn("text", "A latte, please. " * 9),), Turn("text", "Large.")
    whole = chat.context(context)
    assert whole[0] == tokenizer.bos_token_id
    assert chat.context(context, 12) == [whole[0], *whole[-11:]]
    row, said = chat.row(context, answer, 12), chat.completion(context, answer)
    assert row.ids == [whole[0], *whole[-(11 - len(said)) :], *said]
    assert row.cut
    assert chat.rows(context, [answer], 12) == [row]
    assert not chat.row(context, answer).cut
    (start,) = chat.rows(context, [Turn("text", "no " * 30)], 12)
    assert len(start.ids) == 12
    assert start.spoken == [False] + [True] * 11


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
def test_no_length_is_too_short_to_cut_to(chat: ChatFormat, length: int) -> None:
    assert len(chat.context(LONG, length)) == length
    row = chat.row(LONG, ANSWER, length)
    assert len(row.ids) == len(row.spoken) == length
    assert [len(one.ids) for one in chat.rows(LONG, [ANSWER], length)] == [length]
