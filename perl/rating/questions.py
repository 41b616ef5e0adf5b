"""What is asked: completions of a run's roles, and which of those drawn are worth a person's time."""

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from perl.data.records import Context, Speaker, Turn
from perl.errors import UserError
from perl.library import LoadedRun, Score
from perl.roles.role import Role
from perl.roles.saved import weights_sha256

ASKED_AT_ONCE = 4
"""Questions that are drawn together: nobody waits while these last."""
POOL = 24
"""Questions that are drawn where those to ask are chosen."""
CHOSEN = ASKED_AT_ONCE // 2
"""So many of those asked at once; the others are random ones of the rest. From only what a poor reward model
cannot tell, a better one is not learned (docs/rating.md has the figures)."""
TINY = 1e-12
"""No probability is taken to be lower."""
TRIES = 4
"""How often to draw before it is given up that any completion can be rated."""


@dataclass(frozen=True)
class Drawn:
    """A completion, and all that says how it came about.

    Attributes:
        role: base, sft or policy.
        adapter_sha256: of the role's weights file; None of the base.
        place, of: its place in the batch that was drawn, which with the seed decides the draw.
        probability: that it is rated up, by the reward model; None where that was not asked.
    """

    text: str
    role: str
    base_sha256: str
    adapter_sha256: str | None
    temperature: float
    max_new_tokens: int
    seed: int
    place: int
    of: int
    probability: float | None = None


@dataclass(frozen=True)
class Question:
    """A context with the completion to rate, or with two of which one is the better, in the order shown.

    Attributes:
        dialogue: of the data that the context is from; None of one that was typed.
        chosen_by: how it was chosen: random, uncertainty, or typed.
    """

    context: Context
    dialogue: str | None
    completions: tuple[Drawn, ...]
    chosen_by: str

    @cached_property
    def id(self) -> str:
        """The same for the same texts."""
        said = repr((self.context, sorted(one.text for one in self.completions)))
        return hashlib.blake2b(said.encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()


def distance_from_even(scores: Sequence[Score]) -> float:
    """How far the reward model is from not knowing what a person will say, from 0 to 0.5.

    Of one completion, by the probability of a thumb up; of two, by that of the first being the better,
    σ(logit p₁ - logit p₂). What several reward models disagree about would be told here too.
    """
    first, *second = (math.log(max(one.probability, TINY) / max(1 - one.probability, TINY)) for one in scores)
    return 0.5 * math.tanh(abs(first - sum(second)) / 2)  # = |σ(difference) - 0.5|


CHOICES: dict[str, Callable[[Sequence[Score]], float] | None] = {
    "random": None,
    "uncertainty": distance_from_even,
}
"""How to choose among what was drawn: the lowest first; None: as it comes."""


class Questions:
    """Draws questions from a run. To be called from one thread at a time.

    Args:
        choose: a name in `CHOICES`.
        seed: of all that is random; None: another each time.

    Raises:
        UserError: the run has no role that writes, nothing held out, or no reward model to choose by.
    """

    def __init__(self, run: LoadedRun, choose: str = "random", seed: int | None = None) -> None:
        self._run, self._choose, self._random = run, choose, random.Random(seed)
        where = str(run.session.folder.path)
        if not run.policies:
            raise UserError(
                "the run has no role that writes", where=where, remedy="Rate a run of a language model."
            )
        if CHOICES[choose] is not None and run.results.reward is None:
            remedy = "Use --choose random, or train one: a section reward in the recipe."
            raise UserError("the run has no finished reward model to choose by", where=where, remedy=remedy)
        held_out = run.session.held_out
        kinds = (held_out.prompts, held_out.ratings, held_out.comparisons, held_out.demonstrations)
        rows = next((rows for rows in kinds if rows), None)
        if rows is None:
            raise UserError(
                "the run's data have nothing held out", where=where, remedy="Set data.held_out above 0."
            )
        self.contexts: list[tuple[Context, str]] = list(dict.fromkeys((row.context, row.dialogue) for row in rows))
        self.is_text = self.contexts[0][0][-1].speaker == "text"
        self.roles: list[str] = [str(role) for role in run.policies]
        self._order = self._endless()
        self._adapters = {role: self._adapter_sha256(role) for role in self.roles}

    def draw(self, completions: int, known: set[str]) -> list[Question]:
        """New questions on held-out contexts, with one or two completions each.

        Args:
            known: ids of questions that are not to be asked again.

        Raises:
            UserError: whatever is drawn is empty, or known.
        """
        choose = CHOICES[self._choose]
        for _ in range(TRIES):
            contexts = list(itertools.islice(self._order, POOL if choose else ASKED_AT_ONCE))
            found = {one.id: one for one in self._draw(contexts, completions, self._choose) if one.id not in known}
            drawn = list(found.values())
            if choose is not None and drawn:
                drawn = self._chosen(drawn, choose)
            if drawn:
                return drawn
        what = f"{TRIES} draws in turn gave nothing but empty, equal or known completions"
        raise UserError(what, where="the run's roles", remedy="Type a conversation, or raise rl.temperature.")

    def draw_for(self, context: Context, completions: int) -> Question:
        """A question on a context that was typed. Raises `UserError` as `draw`."""
        for _ in range(TRIES):
            for question in self._draw([(context, None)], completions, "typed"):
                return question
        what = f"{TRIES} draws in turn gave nothing but empty or equal completions"
        raise UserError(what, where="the conversation", remedy="Try other words, or one completion at a time.")

    def _draw(
        self, contexts: Sequence[tuple[Context, str | None]], completions: int, chosen_by: str
    ) -> list[Question]:
        """Each role's completions are drawn in one batch; empty ones and pairs of equals are left out."""
        roles = [self._roles(completions) for _ in contexts]
        texts: dict[tuple[int, int], Drawn] = {}
        for role in self.roles:
            cells = [(n, side) for n, some in enumerate(roles) for side, one in enumerate(some) if one == role]
            drawn = self._batch([contexts[n][0] for n, _ in cells], role)
            texts.update(zip(cells, drawn, strict=True))
        questions = [
            Question(context, dialogue, tuple(texts[n, side] for side in range(completions)), chosen_by)
            for n, (context, dialogue) in enumerate(contexts)
        ]
        return [
            one
            for one in questions
            if len({drawn.text for drawn in one.completions}) == completions
            and all(d.text for d in one.completions)
        ]

    def _roles(self, completions: int) -> list[str]:
        """Whose completions are shown, in random order: two different roles where there are two."""
        if completions <= len(self.roles):
            return self._random.sample(self.roles, completions)
        return self._random.choices(self.roles, k=completions)

    def _batch(self, contexts: Sequence[Context], role: str) -> list[Drawn]:
        run, seed = self._run, self._random.getrandbits(31)
        texts = run.complete(contexts, role, seed=seed)
        return [
            Drawn(
                text=text,
                role=role,
                base_sha256=run.session.base.sha256,
                adapter_sha256=self._adapters[role],
                temperature=run.temperature,
                max_new_tokens=run.max_new_tokens,
                seed=seed,
                place=place,
                of=len(texts),
            )
            for place, text in enumerate(texts)
        ]

    def _chosen(self, questions: Sequence[Question], choose: Callable[[Sequence[Score]], float]) -> list[Question]:
        """The questions that are worth most, as many random ones, and what the reward model says of them."""
        speaker: Speaker = "text" if self.is_text else "agent"
        answered = [(one.context, Turn(speaker, d.text)) for one in questions for d in one.completions]
        scores = iter(self._run.score_answers(answered))
        judged = [(question, [next(scores) for _ in question.completions]) for question in questions]
        judged.sort(key=lambda pair: choose(pair[1]))
        others = self._random.sample(judged[CHOSEN:], min(ASKED_AT_ONCE - CHOSEN, len(judged[CHOSEN:])))
        chosen = [*judged[:CHOSEN], *((replace(one, chosen_by="random"), scores) for one, scores in others)]
        self._random.shuffle(chosen)
        return [_with_probabilities(*pair) for pair in chosen]

    def _adapter_sha256(self, role: str) -> str | None:
        session = self._run.session
        return None if role == Role.BASE else weights_sha256(session.roles, session.saved(Role(role)))

    def _endless(self) -> Iterator[tuple[Context, str]]:
        """All contexts in random order, again and again."""
        while True:
            yield from self._random.sample(self.contexts, len(self.contexts))


def _with_probabilities(question: Question, scores: Sequence[Score]) -> Question:
    judged = zip(question.completions, scores, strict=True)
    return replace(question, completions=tuple(replace(d, probability=s.probability) for d, s in judged))
