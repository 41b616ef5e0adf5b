"""The questions: sampled completions of a run's roles, and the choice of those worth a rater's time."""

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
"""Questions that are sampled together, so that raters need not wait for each."""
POOL = 24
"""Questions that are sampled if those to ask are chosen by a criterion."""
CHOSEN = ASKED_AT_ONCE // 2
"""Number of these chosen by the criterion; the others are random. Questions that a poor reward model is unsure of
do not suffice to train a better one (measurements in docs/rating.md)."""
TINY = 1e-12
"""Lower bound for probabilities."""
TRIES = 4
"""Number of attempts to sample a completion that can be rated."""


@dataclass(frozen=True)
class Drawn:
    """A completion and how it was sampled.

    Attributes:
        role: base, sft or policy.
        adapter_sha256: SHA-256 of the role's weights file; None for the base.
        place, of: its position in the sampled batch, and the batch size; with the seed they determine the sample.
        probability: that it is rated up, by the reward model; None if not computed.
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
    """A context with one completion to rate or two to compare, in the order shown.

    Attributes:
        dialogue: the dialogue of the data from which the context is; None if it was typed.
        chosen_by: how it was chosen: random, uncertainty, or typed.
    """

    context: Context
    dialogue: str | None
    completions: tuple[Drawn, ...]
    chosen_by: str

    @cached_property
    def id(self) -> str:
        """Identifier, equal for equal texts."""
        said = repr((self.context, sorted(one.text for one in self.completions)))
        return hashlib.blake2b(said.encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()


def distance_from_even(scores: Sequence[Score]) -> float:
    """Return how sure the reward model is of a person's answer, from 0 (undecided) to 0.5.

    For one completion, by the probability of a thumb up; for two, by the probability that the first is better,
    σ(logit p₁ - logit p₂). Disagreement of several reward models would be added here too.
    """
    first, *second = (math.log(max(one.probability, TINY) / max(1 - one.probability, TINY)) for one in scores)
    return 0.5 * math.tanh(abs(first - sum(second)) / 2)  # = |σ(difference) - 0.5|


CHOICES: dict[str, Callable[[Sequence[Score]], float] | None] = {
    "random": None,
    "uncertainty": distance_from_even,
}
"""Criteria by which questions are chosen, the lowest first; None: no choice."""


class Questions:
    """Samples questions from a run. To be called from one thread at a time.

    Args:
        choose: a name in `CHOICES`.
        seed: seed of everything random; None: a new one each time.

    Raises:
        UserError: the run has no role that generates, no held-out data, or no reward model to choose by.
    """

    def __init__(self, run: LoadedRun, choose: str = "random", seed: int | None = None) -> None:
        self._run, self._choose, self._random = run, choose, random.Random(seed)
        where = str(run.session.folder.path)
        if not run.policies:
            raise UserError(
                "the run has no role that generates", where=where, remedy="Rate a run of a language model."
            )
        if CHOICES[choose] is not None and run.results.reward is None:
            remedy = "Use --choose random, or train one: a section reward in the recipe."
            raise UserError("the run has no finished reward model to choose by", where=where, remedy=remedy)
        held_out = run.session.held_out
        kinds = (held_out.prompts, held_out.ratings, held_out.comparisons, held_out.demonstrations)
        asked = ([(row.context, row.dialogue) for row in rows if row.context] for rows in kinds)
        contexts = next(filter(None, asked), None)
        if contexts is None:  # in conversations that the assistant begins there is no prompt
            remedy = "Rate a run on data with prompts, or with conversations that the user begins."
            raise UserError("the run has no held-out prompts", where=where, remedy=remedy)
        self.contexts: list[tuple[Context, str]] = list(dict.fromkeys(contexts))
        self.is_text = self.contexts[0][0][-1].speaker == "text"
        self.roles: list[str] = [str(role) for role in run.policies]
        self._order = self._endless()
        self._adapters = {role: self._adapter_sha256(role) for role in self.roles}

    def draw(self, completions: int, known: set[str]) -> list[Question]:
        """Sample new questions on held-out contexts, with one or two completions each.

        Args:
            known: ids of questions that must not be asked again.

        Raises:
            UserError: everything sampled is empty or known.
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
        what = f"{TRIES} attempts gave only empty, equal or known completions"
        raise UserError(what, where="the run's roles", remedy="Type a conversation, or raise rl.temperature.")

    def draw_for(self, context: Context, completions: int) -> Question:
        """Sample a question on a typed context. Raises `UserError` as `draw` does."""
        for _ in range(TRIES):
            for question in self._draw([(context, None)], completions, "typed"):
                return question
        what = f"{TRIES} attempts gave only empty or equal completions"
        raise UserError(what, where="the conversation", remedy="Try other words, or one completion at a time.")

    def _draw(
        self, contexts: Sequence[tuple[Context, str | None]], completions: int, chosen_by: str
    ) -> list[Question]:
        """Sample each role's completions in one batch; leave out empty ones and equal pairs."""
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
        """Return whose completions are shown, in random order: two different roles if there are two."""
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
        """Choose the best questions and as many random ones, and add the reward model's probabilities."""
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
        """Yield all contexts in random order, endlessly."""
        while True:
            yield from self._random.sample(self.contexts, len(self.contexts))


def _with_probabilities(question: Question, scores: Sequence[Score]) -> Question:
    judged = zip(question.completions, scores, strict=True)
    return replace(question, completions=tuple(replace(d, probability=s.probability) for d, s in judged))
