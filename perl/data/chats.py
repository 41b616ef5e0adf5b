"""Converts plain text to chats: a prompt becomes a user turn, a completion an assistant turn.

Chat models expect their chat format. With `data.chat: true`, rows of plain text, such as those of tables, are put
into it.
"""

from dataclasses import replace

from perl.data.records import Context, Records, Speaker, Turn


def asked(context: Context, chat: bool = True) -> Context:
    """Return a context with its plain text as user turns, if `chat`."""
    return tuple(Turn("user", one.text.strip()) if chat and one.speaker == "text" else one for one in context)


def answered(answer: Turn, chat: bool = True) -> Turn:
    """Return an answer as an assistant turn if it is plain text and `chat`."""
    return Turn("agent", answer.text.strip()) if chat and answer.speaker == "text" else answer


def as_chats(records: Records) -> Records:
    """Return all records, with plain text in contexts and answers converted to chats."""
    return replace(
        records,
        demonstrations=[
            replace(one, context=asked(one.context), answer=tuple(map(answered, one.answer)))
            for one in records.demonstrations
        ],
        ratings=[replace(one, context=asked(one.context), answer=answered(one.answer)) for one in records.ratings],
        comparisons=[
            replace(one, context=asked(one.context), better=answered(one.better), worse=answered(one.worse))
            for one in records.comparisons
        ],
        prompts=[replace(one, context=asked(one.context)) for one in records.prompts],
    )


def speakers_of(records: Records) -> set[Speaker]:
    """Return the speakers that occur in any record."""
    answers = (one.answer for one in records.demonstrations)
    contexts = (one.context for one in records.rows())
    return {turn.speaker for turns in (*answers, *contexts) for turn in turns}
