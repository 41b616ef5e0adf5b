"""Converts rows of the public preference sets, in their published schemas, to comparisons.

Anthropic HH (Bai et al. 2022): two dialogues as text that differ only in their last turn.
SHP (Ethayarajh et al. 2022): a Reddit post and two of its comments.
TL;DR comparisons (Stiennon et al. 2020): a Reddit post and two summaries.

Each function also reads TRL's conversion of the set, in the formats of `perl.data.jsonl`.
"""

import re

from perl.data.jsonl import parse_row
from perl.data.records import Comparison, Context, Speaker, Turn
from perl.data.rows import Row, RowError, binary_label, first_user_key, object_with, shown, usable_text

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_SPEAKERS: dict[str, Speaker] = {"Human": "user", "Assistant": "agent"}
_SHP_FIELDS = ("post_id", "history", "human_ref_A", "human_ref_B", "labels")
_TLDR_FIELDS = ("info", "summaries", "choice")


def hh_row(row: Row) -> Comparison:
    r"""Convert `{"chosen": "\n\nHuman: …\n\nAssistant: …", "rejected": …}`; their common turns are the context.

    The dialogue is identified by its first turn, which all of its prefixes share.

    Raises:
        RowError: the row does not fit, or the two differ before their last turn.
    """
    texts = row.get("chosen"), row.get("rejected")
    if "prompt" in row or not all(isinstance(text, str) for text in texts):
        return _own_format(row)
    chosen, rejected = _hh_turns(texts[0], "chosen"), _hh_turns(texts[1], "rejected")
    context = chosen[:-1]
    if context != rejected[:-1]:
        raise RowError("chosen and rejected differ before their last turn")
    return _comparison(context, chosen[-1], rejected[-1], first_user_key(context))


def shp_row(row: Row) -> Comparison:
    """Convert `{"post_id", "history", "human_ref_A", "human_ref_B", "labels", …}`; label 1 prefers A, 0 prefers B.

    Scores and their ratio are not read: they grow with a post's audience, not with the preference's certainty.

    Raises:
        RowError: the row does not fit.
    """
    if not row.keys() & set(_SHP_FIELDS):
        return _own_format(row)
    object_with(row, _SHP_FIELDS)
    a, b = (Turn("agent", usable_text(row[name], name)) for name in ("human_ref_A", "human_ref_B"))
    better, worse = (a, b) if binary_label(row["labels"], "labels") else (b, a)
    context = (Turn("user", usable_text(row["history"], "history")),)
    return _comparison(context, better, worse, f"shp:{usable_text(row['post_id'], 'post_id')}")


def tldr_row(row: Row) -> Comparison:
    """Convert `{"info": {"id", "subreddit", "title", "post", …}, "summaries": [{"text"}, {"text"}], "choice": 0}`.

    Prompt and answer are plain text in the authors' format, `SUBREDDIT: … TITLE: … POST: … TL;DR:`.

    Raises:
        RowError: the row does not fit, or is about a news article, as some in the published files are.
    """
    if not row.keys() & set(_TLDR_FIELDS):
        return _own_format(row)
    object_with(row, _TLDR_FIELDS)
    info, summaries, choice = object_with(row["info"], ("id",), "info"), row["summaries"], row["choice"]
    if info.get("post") is None and info.get("article") is not None:
        raise RowError("about a news article; a Reddit post expected")
    object_with(info, ("subreddit", "title", "post"), "info")
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise RowError(f"summaries is {shown(summaries)}; a list of two expected")
    if not isinstance(choice, int) or isinstance(choice, bool) or choice not in (0, 1):
        raise RowError(f"choice is {shown(choice)}; 0 or 1 expected")
    subreddit, title, post = (usable_text(info[name], f"info.{name}") for name in ("subreddit", "title", "post"))
    query = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    texts = [
        usable_text(object_with(summary, ("text",), f"summaries[{n}]")["text"], f"summaries[{n}].text")
        for n, summary in enumerate(summaries)
    ]
    # Most published texts begin with the space that follows "TL;DR:", a few do not.
    better, worse = (Turn("text", f" {texts[index].strip()}") for index in (choice, 1 - choice))
    return _comparison((Turn("text", query),), better, worse, f"tldr:{usable_text(info['id'], 'info.id')}")


def _hh_turns(text: object, name: str) -> Context:
    """Return a dialogue as turns; the last must be the assistant's."""
    before, *rest = _HH_TURN.split(usable_text(text, name))
    if before.strip() or not rest:
        raise RowError(f"{name} is {shown(text)}; a dialogue that begins with '\\n\\nHuman:' expected")
    turns = tuple(
        Turn(_HH_SPEAKERS[name], words.strip()) for name, words in zip(rest[::2], rest[1::2], strict=True)
    )
    for number, turn in enumerate(turns[:-1], start=1):
        if not turn.text:
            raise RowError(f"{name}: turn {number} is empty")
    if turns[-1].speaker != "agent":
        raise RowError(f"{name} ends with a turn by the human")
    return turns


def _comparison(context: Context, better: Turn, worse: Turn, dialogue: str) -> Comparison:
    if not any(turn.text.strip() for turn in context):
        raise RowError("there is no prompt")
    if not (better.text.strip() and worse.text.strip()):
        raise RowError(f"the {'worse' if better.text.strip() else 'better'} answer is empty")
    if better == worse:
        raise RowError("both answers are the same")
    return Comparison(context, better, worse, dialogue)


def _own_format(row: Row) -> Comparison:
    record = parse_row(row)[0]
    if not isinstance(record, Comparison):
        raise RowError("the row is not a comparison")
    return record
