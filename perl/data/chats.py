"""Plain text as chats: a prompt is what a user says, a completion what the assistant answers.

A chat model knows its chat format and little else: rows of plain text, as tables have them, reach it in that
format under `data.chat: true`.
"""

from dataclasses import replace

from perl.data.records import Context, Records, Speaker, Turn


def asked(context: Context, chat: bool = True) -> Context:
    """A context whose plain text is a user's, where that is to be a chat."""
    return tuple(Turn("user", one.text.strip()) if chat and one.speaker == "text" else one for one in context)


def answered(answer: Turn, chat: bool = True) -> Turn:
    """An answer that is the assistant's, if it was plain text and is to be a chat's."""
    return Turn("agent", answer.text.strip()) if chat and answer.speaker == "text" else answer


def as_chats(records: Records) -> Records:
    """All records, with plain text in their contexts and answers as chats."""
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
    """Who says something in any record."""
    answers = (one.answer for one in records.demonstrations)
    contexts = (one.context for one in records.rows())
    return {turn.speaker for turns in (*answers, *contexts) for turn in turns}
