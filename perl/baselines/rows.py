"""The rows of a run's ratings as TRL's trainers for preferences take them, tokenized."""

import random
from collections.abc import Sequence

from perl.data.pairs import pair_ratings
from perl.data.records import Context, Records, Turn
from perl.errors import UserError
from perl.stages.reward_rows import max_length
from perl.stages.session import Session

Row = dict[str, list[int] | bool]
"""Of KTO `prompt_ids`, `completion_ids`, `KL_completion_ids` and `label`; of DPO `prompt_ids`, `chosen_ids` and
`rejected_ids`. Completions have their end token."""


def kto_rows(session: Session, records: Records, batch_size: int) -> list[Row]:
    """The ratings in an order that follows from the seed, which the trainer keeps.

    `KL_completion_ids` are the completion of another prompt of the batch, by which KTO estimates its KL. A last
    batch of one row has no other: it is left out.

    Raises:
        UserError: there are not ratings of both labels.
    """
    ratings = list(records.ratings)
    if len({one.label for one in ratings}) < 2:
        raise UserError(
            f"{session.recipe.data.source} has no thumbs of both labels to train on",
            where="--baselines kto",
            remedy="Leave kto out, or add rows of prompt, completion and label.",
        )
    random.Random(session.recipe.seed).shuffle(ratings)
    rows: list[Row] = []
    for one in ratings:
        prompt, (completion,) = _ids(session, one.context, [one.answer])
        rows.append({"prompt_ids": prompt, "completion_ids": completion, "label": one.label})
    if len(rows) % batch_size == 1:
        rows.pop()
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        for row, other in zip(batch, [batch[-1], *batch], strict=False):
            row["KL_completion_ids"] = other["completion_ids"]
    return rows


def dpo_rows(session: Session, records: Records, batch_size: int) -> list[Row]:
    """The comparisons, or the pairs that ratings of one context with both labels make.

    Raises:
        UserError: there are none.
    """
    pairs = records.comparisons or pair_ratings(records.ratings)
    if not pairs:
        raise UserError(
            f"{session.recipe.data.source} has no pairs to train on, nor ratings of one context with both labels",
            where="--baselines dpo",
            remedy="Leave dpo out, or use data with chosen and rejected answers.",
        )
    rows: list[Row] = []
    for pair in pairs:
        prompt, (chosen, rejected) = _ids(session, pair.context, [pair.better, pair.worse])
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return rows


def _ids(session: Session, context: Context, answers: Sequence[Turn]) -> tuple[list[int], list[list[int]]]:
    """A prompt as RL has it, cut so that each completion of it fits as in reward modelling; and these."""
    chat, length = session.base.chat, max_length(session)
    completions = [chat.completion(context, answer)[-length + 1 :] for answer in answers]
    return chat.context(context, length - max(map(len, completions))), completions
