"""The rows that the reward model is trained and evaluated on: rated and compared answers as tokens."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from perl.backbones.tokens import Tokens
from perl.data.pairs import to_compare
from perl.data.records import Comparison, Prompt, Rating, Records, Turn
from perl.errors import UserError
from perl.measure.rated_rows import RatedRows
from perl.stages.reward_loss import Example
from perl.stages.session import Session
from perl.system.progress import counted


@dataclass(frozen=True)
class Rows(RatedRows):
    """Answers with their contexts as tokens."""

    tokens: list[Tokens]
    targets: list[float]
    """The probability of a thumb up, or that this answer of a pair is the better one."""
    margins: list[float]
    """Margins of the pairs."""

    @property
    def ids(self) -> list[list[int]]:
        return [row.ids for row in self.tokens]

    @property
    def cut(self) -> int:
        """Number of rows that were too long."""
        return sum(row.cut for row in self.tokens)


def training_rows(session: Session, records: Records | None = None) -> Rows:
    """Return the rows to train on, from these records or from all training records.

    Raises:
        UserError: no rows of the kind that the loss needs, or ratings of one class only.
    """
    assert session.recipe.reward is not None
    rows = session_rows(session, records or session.train, session.recipe.reward.loss)
    if len(set(rows.labels)) < 2:
        all_of_them = f"all of them thumbs {'up' if rows.labels[0] else 'down'}"
        raise UserError(
            f"{counted(len(rows.labels), 'rating')}, {all_of_them}: there is nothing to distinguish",
            where=f"data.source {session.recipe.data.source}",
            remedy="Add ratings of the other kind.",
        )
    return rows


def held_out_rows(session: Session) -> Rows:
    """Return the rows to evaluate on: of the kind that it is trained on, or of any kind if there are none.

    Raises:
        UserError: there are neither ratings nor comparisons.
    """
    assert session.recipe.reward is not None
    records, loss = session.held_out, str(session.recipe.reward.loss)
    if (loss != "thumbs" and not to_compare(records, loss)) or (loss == "both" and not records.ratings):
        loss = "any"
    return session_rows(session, records, loss)


def session_rows(session: Session, records: Records, loss: str, source: str | None = None) -> Rows:
    """Return the rated or compared answers as tokens, the oldest context truncated first.

    Args:
        loss: decides which records are used; `any`: ratings and comparisons as they are.
        source: the source of records that do not name one; by default the recipe's.

    Raises:
        UserError: no records are of the kind that the loss needs.
    """
    ratings, comparisons = _chosen(records, loss, source := source or session.recipe.data.source)
    answers = _answers(ratings, comparisons, records.prompts, source)
    rated = [float(one.label) if one.probability is None else one.probability for one in ratings]
    better = [one.probability for one in comparisons]
    both = zip(answers.contexts, answers.answers, strict=True)
    return Rows(
        **vars(answers),
        tokens=[_tokens(session, context, answer) for context, answer in both],
        targets=[*rated, *better, *(1 - probability for probability in better)],
        margins=[one.margin for one in comparisons],
    )


def _tokens(session: Session, context: Sequence[Turn], answer: Turn) -> Tokens:
    key = (tuple(context), answer, session.max_length("reward"))
    if key not in session.answer_tokens:
        session.answer_tokens[key] = session.base.chat.row(*key)
    return session.answer_tokens[key]


def answers_of(records: Records, loss: str, source: str) -> RatedRows:
    """Return the answers of `session_rows`, without their tokens."""
    return _answers(*_chosen(records, loss, source), records.prompts, source)


def _chosen(records: Records, loss: str, source: str) -> tuple[list[Rating], list[Comparison]]:
    ratings, comparisons = [] if loss == "pairs" else records.ratings, to_compare(records, loss)
    if not records.ratings and not records.comparisons:
        raise UserError(
            f"{source} has neither ratings nor pairs",
            where="its rows",
            remedy="Use rows with prompt, completion and label, or with prompt, chosen and rejected.",
        )
    if not comparisons and (loss in ("pairs", "both") or not ratings):
        raise UserError(
            f"{source} has neither pairs nor ratings of one context with both labels",
            where="reward.loss",
            remedy="Set reward.loss: thumbs, or use data with chosen and rejected answers.",
        )
    if loss == "both" and not ratings:
        raise UserError(
            f"{source} has no ratings, only pairs",
            where="reward.loss",
            remedy="Set reward.loss: pairs, or add rows with completion and label.",
        )
    return ratings, comparisons


def _answers(
    ratings: Sequence[Rating], comparisons: Sequence[Comparison], prompts: Sequence[Prompt], source: str
) -> RatedRows:
    first, count = len(ratings), len(comparisons)
    records: list[Rating | Comparison] = [*ratings, *comparisons, *comparisons]
    contexts = [record.context for record in records]
    # A row's additional fields are on its prompt; rows of one file may name different sources.
    named = {prompt.context: str(prompt.columns["source"]) for prompt in prompts if "source" in prompt.columns}
    gold = [rating.gold for rating in ratings if rating.gold is not None]
    return RatedRows(
        contexts=contexts,
        answers=[
            *(one.answer for one in ratings),
            *(one.better for one in comparisons),
            *(one.worse for one in comparisons),
        ],
        dialogues=[record.dialogue for record in records],
        sources=[named.get(context, source) for context in contexts],
        labels=[rating.label for rating in ratings] or [True] * count + [False] * count,
        gold=gold if gold and len(gold) == len(ratings) else None,
        pairs=[(first + index, first + count + index) for index in range(count)],
    )


def training_examples(rows: Rows, loss: str) -> list[Example]:
    """Return one training example per rated answer, pair of answers, or both."""
    examples = []
    if loss != "pairs":
        # Each class has half of the total weight, however rare it is; the weights sum to the number of rows.
        count, up = len(rows.labels), sum(rows.labels)
        weight = {True: count / (2 * up), False: count / (2 * (count - up))}
        examples = [_example(rows, [row], weight=weight[label]) for row, label in enumerate(rows.labels)]
    if loss != "thumbs":
        pairs = zip(rows.pairs, rows.margins, strict=True)
        examples += [_example(rows, [better, worse], margin=margin) for (better, worse), margin in pairs]
    return examples


def bootstrapped(examples: Sequence[Example], dialogues: Sequence[str], seed: int) -> list[Example]:
    """Return the examples of dialogues drawn with replacement, as many as there are dialogues.

    Args:
        dialogues: the dialogue of each row.
    """
    of_dialogue: dict[str, list[Example]] = {}
    for example in examples:
        of_dialogue.setdefault(dialogues[example["numbers"][0]], []).append(example)
    drawn = random.Random(seed).choices(list(of_dialogue.values()), k=len(of_dialogue))
    return list(itertools.chain.from_iterable(drawn))


def _example(rows: Rows, numbers: list[int], margin: float = 0.0, weight: float = 1.0) -> Example:
    tokens = [rows.tokens[number] for number in numbers]
    return {
        "rows": [row.ids for row in tokens],
        "answers": [row.completion_length() for row in tokens],
        "numbers": numbers,
        "target": rows.targets[numbers[0]],
        "margin": margin,
        "weight": weight,
        "length": max(len(row.ids) for row in tokens),
    }
