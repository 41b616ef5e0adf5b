"""Tokenization of prompts, and the order in which steps take them."""

import random
from collections.abc import Sequence

from perl.backbones.chat import ChatFormat
from perl.data.records import Prompt
from perl.errors import UserError
from perl.rl.rollout import EncodedPrompts
from perl.system.seeds import derived_seed


def encode_prompts(
    prompts: Sequence[Prompt],
    chat: ChatFormat,
    *,
    context_length: int,
    max_new_tokens: int,
    limit: int | None,
    source: str,
) -> EncodedPrompts:
    """Tokenize prompts.

    Args:
        context_length: context length of the base.
        limit: maximum tokens of a prompt; older context is cut off. None: longer prompts are refused.
        source: source of the prompts, for messages.

    Raises:
        UserError: a prompt leaves no room for a completion in the base's context, or plain text and messages are
            mixed.
    """
    room = context_length - max_new_tokens
    if room < 1 or (limit is not None and limit > room):
        raise UserError(
            f"the base's context is {context_length} tokens: no room for prompts of {limit or 1} and completions "
            f"of {max_new_tokens}",
            where="rl.max_new_tokens",
            remedy="Lower rl.max_new_tokens or rl.max_prompt_length.",
        )
    text = [prompt.context[-1].speaker == "text" for prompt in prompts]
    if any(text) != all(text):
        raise UserError(
            f"the prompts are of two kinds, {sum(text)} of plain text and {len(text) - sum(text)} of messages, "
            "whose completions end differently",
            where=source,
            remedy="Write all prompts as text, or all as messages.",
        )
    ids, cut = [chat.context(prompt.context) for prompt in prompts], 0
    for index, prompt in enumerate(prompts):
        if limit is not None and len(ids[index]) > limit:
            ids[index], cut = chat.context(prompt.context, limit), cut + 1
    longest = max(range(len(ids)), key=lambda index: len(ids[index]))
    if len(ids[longest]) > room:
        raise UserError(
            f"a prompt has {len(ids[longest])} tokens, but the base has room for {room} before the completion",
            where=f"prompt of dialogue {prompts[longest].dialogue[:60]!r}",
            remedy=f"Shorten it, or set rl.max_prompt_length (at most {room}) to cut older context.",
        )
    return EncodedPrompts(list(prompts), ids, list(range(len(prompts))), cut)


def prompts_of(step: int, per_step: int, count: int, seed: int) -> list[int]:
    """Return the indices of a step's prompts, out of `count`: all are seen once before any is seen again."""

    def shuffled(passed: int) -> list[int]:
        return random.Random(derived_seed(seed, "order", passed)).sample(range(count), count)

    places = range(step * per_step, (step + 1) * per_step)
    orders = {passed: shuffled(passed) for passed in {place // count for place in places}}
    return [orders[place // count][place % count] for place in places]
