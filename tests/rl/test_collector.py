"""The texts that a collector passes to rewards."""

from types import SimpleNamespace
from typing import Any, cast

from perl.backbones.chat import ChatFormat
from perl.backbones.loading import numbered_tokens
from perl.data.records import Prompt, Turn
from perl.rl.collector import Collector
from perl.rl.rollout import EncodedPrompts

NOTHING = cast(Any, None)


def test_completions_of_plain_text_keep_their_whitespace_and_those_of_chats_do_not() -> None:
    """A reward function can append a completion to its prompt, so code must keep its indentation."""
    chat = ChatFormat(numbered_tokens(300))
    collector = Collector(NOTHING, NOTHING, NOTHING, NOTHING, chat, micro_batch_size=1, seed=0)
    contexts = [(Turn("text", "def f():"),), (Turn("user", "hi"),)]
    prompts = EncodedPrompts(
        [Prompt(one, "d", {}) for one in contexts], [chat.context(one) for one in contexts], [0, 1]
    )
    drawn = [[*chat.tokenizer.encode("\n  return 1\n"), chat.eos_id]] * 2
    samples = cast(Any, SimpleNamespace(completions=lambda: drawn))
    assert collector._texts(prompts, samples) == ["\n  return 1\n", "return 1"]
