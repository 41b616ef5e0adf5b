"""Chat formats for several templates: prefixes, the agent's tokens, and the end of its turn."""

import pytest
from transformers import PreTrainedTokenizerFast

from perl.backbones.chat import ChatFormat
from perl.data.records import Turn
from perl.errors import UserError
from tests.conftest import CHATML, make_tokenizer

LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}"
    "{% for m in messages %}<|start|>{{ m.role }}<|mid|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|mid|>\n\n{% endif %}"
)


def chatml() -> PreTrainedTokenizerFast:
    special = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return make_tokenizer(
        special,
        CHATML,
        pad_token="<|pad|>",
        eos_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def llama_2() -> PreTrainedTokenizerFast:
    special = ["<unk>", "<s>", "</s>"]
    return make_tokenizer(special, LLAMA_2, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama_3() -> PreTrainedTokenizerFast:
    special = ["<|begin|>", "<|end|>", "<|start|>", "<|mid|>", "<|eot|>"]
    return make_tokenizer(
        special,
        LLAMA_3,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|start|>", "<|mid|>", "<|eot|>"],
    )


def plain() -> PreTrainedTokenizerFast:
    return make_tokenizer(["<|endoftext|>"], None, eos_token="<|endoftext|>")


def end_is_pad() -> PreTrainedTokenizerFast:
    """Return a tokenizer that pads with the end token, as many published ones do."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return make_tokenizer(special, CHATML, pad_token="<|im_end|>", eos_token="<|im_end|>", bos_token="<|im_end|>")


FORMATS = {
    chatml: "<|im_end|>",
    llama_2: "</s>",
    llama_3: "<|eot|>",
    plain: "<|endoftext|>",
    end_is_pad: "<|im_end|>",
}
CONTEXTS = [
    (Turn("user", "A latte, please."),),
    (Turn("system", "Be kind."), Turn("user", "hi")),
    (Turn("user", "A latte, please."), Turn("agent", "What size?"), Turn("user", "Large.")),
    (Turn("user", "a"), Turn("agent", 'call find {"size": "large"}'), Turn("api", '{"find":{"ok":true}}')),
    (
        Turn("user", "  spaces \n and lines "),
        Turn("agent", "a"),
        Turn("user", "a"),
        Turn("agent", "a"),
        Turn("user", "a"),
    ),
]
ANSWERS = [Turn("agent", "One large latte, naïve 😀?"), Turn("agent", "a"), Turn("agent", 'call pay {"sum": 3}')]


@pytest.fixture(params=FORMATS, ids=lambda make: make.__name__, scope="module")
def chat(request: pytest.FixtureRequest) -> ChatFormat:
    return ChatFormat(request.param())


@pytest.fixture(params=FORMATS.items(), ids=lambda item: item[0].__name__)
def ended(request: pytest.FixtureRequest) -> tuple[ChatFormat, str]:
    make, end = request.param
    return ChatFormat(make()), end


def test_the_end_of_turn_is_found(ended: tuple[ChatFormat, str]) -> None:
    chat, end = ended
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_id) == end
    assert chat.ends(CONTEXTS[0]) == tuple(dict.fromkeys((chat.end_id, chat.eos_id)))
    assert chat.ends([Turn("text", "Once")]) == (chat.eos_id,) == (chat.tokenizer.eos_token_id,)


def test_padding_is_not_the_end(chat: ChatFormat) -> None:
    assert chat.pad_id not in (chat.end_id, chat.eos_id)
    assert 0 <= chat.pad_id < len(chat.tokenizer)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_context_has_the_same_tokens_whatever_follows(
    chat: ChatFormat, context: tuple[Turn, ...], answer: Turn
) -> None:
    before = chat.context(context)
    tokens = chat.row(context, answer)
    assert tokens.ids[: len(before)] == before
    assert tokens.spoken == [False] * len(before) + [True] * (len(tokens.ids) - len(before))
    (longer,) = chat.rows(context, [answer, Turn("user", "and?"), Turn("agent", "no")])
    assert longer.ids[: len(tokens.ids)] == tokens.ids


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_ends_once_and_reads_back(chat: ChatFormat, answer: Turn) -> None:
    ids = chat.completion(CONTEXTS[2], answer)
    assert ids[-1] == chat.end_id
    assert ids.count(chat.end_id) == 1
    assert chat.decode(ids) == chat.decode(ids[:-1]) == answer.text


def test_only_the_agent_of_the_answer_is_marked(chat: ChatFormat) -> None:
    answer = [Turn("agent", "What size?"), Turn("user", "Large."), Turn("agent", "Yes."), Turn("api", "{}")]
    (tokens,) = chat.rows(CONTEXTS[2], answer)
    said = [token for token, spoken in zip(tokens.ids, tokens.spoken, strict=True) if spoken]
    first, second = chat.completion(CONTEXTS[2], answer[0]), chat.completion(CONTEXTS[2], answer[2])
    assert said == first + second
    unheard = chat.decode([token for token, spoken in zip(tokens.ids, tokens.spoken, strict=True) if not spoken])
    assert "Large." in unheard
    assert unheard.count("What size?") == 1, "the context's own, which is not the answer's"
    assert tokens.spoken[-1], "nothing after the last agent turn could be learned"


def test_plain_text_is_tokenized_as_it_stands(chat: ChatFormat) -> None:
    context, answer = (Turn("text", "Once upon"),), Turn("text", " a time.")
    tokens = chat.row(context, answer)
    assert [tokens] == chat.rows(context, [answer])
    before = chat.context(context)
    assert tokens.ids[: len(before)] == before
    assert chat.completion(context, answer) == tokens.ids[len(before) :]
    assert tokens.ids[-1] == chat.eos_id
    assert before[-1] != chat.eos_id
    assert chat.decode(tokens.ids) == "Once upon a time."
    assert chat.decode(tokens.ids[len(before) :], before) == answer.text


def test_plain_text_does_not_end_before_the_answer() -> None:
    """Tokenizers such as T5's append the end token to every text."""
    from tokenizers import processors

    tokenizer = plain()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
    )
    chat = ChatFormat(tokenizer)
    context, answer = (Turn("text", "Once upon"),), Turn("text", " a time.")
    assert chat.row(context, answer).ids.count(chat.eos_id) == 1
    assert chat.completion(CONTEXTS[0], ANSWERS[0]).count(chat.end_id) == 1


def test_the_plain_fallback_is_readable() -> None:
    chat = ChatFormat(plain())
    context = CONTEXTS[2]
    text = chat.tokenizer.decode(chat.context(context))
    assert text == "User: A latte, please.\nAgent: What size?<|endoftext|>\nUser: Large.\nAgent:"


def test_the_format_is_told_apart_by_its_hash() -> None:
    hashes = {ChatFormat(make()).sha256 for make in (chatml, llama_2, llama_3, plain)}
    assert len(hashes) == 4
    assert ChatFormat(chatml()).sha256 == ChatFormat(chatml()).sha256


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | replace('One', 'ONE') }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m.content.split('.')[0] }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% if '.' not in m.content %}<|im_end|>{% endif %}{% endfor %}",
    ],
    ids=["other words", "shortened", "without its end"],
)
def test_a_template_that_rewrites_the_answer_is_refused(template: str) -> None:
    chat = ChatFormat(make_tokenizer(["<|im_end|>"], template, eos_token="<|im_end|>"))
    with pytest.raises(UserError, match=r"rewrites the agent's turn 'One\. Two\.'") as caught:
        chat.row((Turn("user", "Hi"),), Turn("agent", "One. Two."))
    assert "Use a base whose chat template" in str(caught.value)


def test_an_answer_follows_the_prompt_where_the_template_counts_what_is_to_come() -> None:
    template = "{{ messages|length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    chat = ChatFormat(make_tokenizer(["<|im_end|>"], template, eos_token="<|im_end|>"))
    row = chat.row((Turn("user", "Hi"),), Turn("agent", "One."))
    assert chat.tokenizer.decode(row.ids) == "1Hi<|im_end|>One.<|im_end|>"
    assert row.prompt_length() == len(chat.context((Turn("user", "Hi"),)))


def test_an_agent_that_speaks_first_is_learned_from_its_words_on() -> None:
    chat = ChatFormat(plain())
    (tokens,) = chat.rows((), [Turn("agent", "Hello."), Turn("user", "hi"), Turn("agent", "yes")])
    learned = [token for token, spoken in zip(tokens.ids, tokens.spoken, strict=True) if spoken]
    assert chat.tokenizer.decode(learned) == "Hello.<|endoftext|> yes<|endoftext|>"


def test_a_template_without_an_end_is_refused() -> None:
    tokenizer = make_tokenizer(
        ["<|end|>"], "{% for m in messages %}{{ m.content }}\n{% endfor %}", eos_token="<|end|>"
    )
    with pytest.raises(UserError, match="does not end the agent's turn") as caught:
        ChatFormat(tokenizer)
    assert "Add the end token" in str(caught.value)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(UserError, match="has no end token") as caught:
        ChatFormat(make_tokenizer(["<|pad|>"], CHATML, pad_token="<|pad|>"))
    assert "Set eos_token" in str(caught.value)


def test_a_template_that_refuses_a_role_is_named() -> None:
    template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    tokenizer = make_tokenizer(["<|end|>"], template + "{{ m.content }}<|end|>{% endfor %}", eos_token="<|end|>")
    with pytest.raises(UserError, match=r"refuses a dialogue of user, agent, api: no tools \(it begins '"):
        ChatFormat(tokenizer).context(CONTEXTS[3])
