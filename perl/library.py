"""PERL from Python: run a recipe, and use what a run has trained."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from perl.completion import Completion
from perl.data.chats import answered, asked
from perl.data.records import Context, Rating, Turn
from perl.errors import UserError
from perl.library_input import Messages, lists, record
from perl.measure.ensemble import ensemble_scores
from perl.measure.metrics import probabilities
from perl.parallel.process_group import process_group
from perl.recipe import Recipe, StageName, load_recipe
from perl.results import Stages
from perl.rl.samplers.base import Sampling, Share
from perl.rl.samplers.local import LocalSampler
from perl.roles.role import Role
from perl.stages import pipeline
from perl.stages.opening import open_run
from perl.stages.reward_scores import run_disagreement, run_member_scores, scores_are_log_odds, zero_points
from perl.stages.session import Session
from perl.system.seeds import derived_seed

POLICIES = (Role.BASE, Role.SFT, Role.POLICY)
"""The roles that generate."""
COLDEST = 1e-4
"""Lowest temperature, also for 0: the most likely token is sampled, unless two are almost equal."""
MICRO_BATCH_SIZE = 32
BATCH = 64
"""Prompts that `LoadedRun.generate` samples at a time."""
PIECE = 16
"""Tokens that `LoadedRun.pieces` samples at a time."""


@dataclass(frozen=True)
class Score:
    """The reward model's score of a completion.

    Attributes:
        score: log-odds if trained on thumbs, else a Bradley-Terry score.
        probability: calibrated probability of a thumb up (for a model of pairs, of being better than an average
            training completion).
        disagreement: for an ensemble, the standard deviation of its members' probabilities of a thumb up (for a
            model of pairs, of their scores minus their means); the larger it is, the likelier the score is wrong.
    """

    score: float
    probability: float
    disagreement: float | None = None

    @property
    def confidence(self) -> float:
        """Probability of the likelier of the two labels, from 0.5 to 1."""
        return max(self.probability, 1 - self.probability)


def run(
    recipe: Recipe | str | Path | Mapping[str, object],
    out: str | Path | None = None,
    stages: Sequence[StageName] | None = None,
    source: str | Path | None = None,
) -> Stages:
    """Run the unfinished stages of a recipe, as `perl-rlhf run` does; in one process or several.

    Args:
        recipe: as returned by `load_recipe`, or its argument.
        out: the run folder; runs/NAME by default.
        stages: the stages to run; all of the recipe's by default.
        source: folder of another run, whose stages are reused if they fit.

    Returns:
        The results of all finished stages, as in report.json under `stages`.

    Raises:
        UserError: the recipe or the input of a stage cannot be used; nothing has been written in this case.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    with process_group() as engine:
        folder = Path(out or Path("runs") / recipe.name)
        return pipeline.run(recipe, folder, stages, engine=engine, source=None if source is None else Path(source))


def load_run(path: str | Path) -> "LoadedRun":
    """Load the run in a folder with its base; roles are loaded when they are used.

    Raises:
        UserError: this is not a run folder, or its base or data cannot be used.
    """
    return LoadedRun(open_run(path))


class LoadedRun:
    """The models that a run has trained, ready to generate and to score."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.recipe = session.recipe
        self.results: Stages = session.folder.results()

    @property
    def policies(self) -> list[str]:
        """The roles that can generate: `base`, and `sft` and `policy` if they are trained."""
        if self.session.roles.backbone.refusal("generation", "base.model") is not None:
            return []
        return [role for role in POLICIES if role is Role.BASE or self.session.saved(role).exists()]

    def generate(
        self,
        prompts: Iterable[str | Messages],
        role: str = "policy",
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> list[str]:
        """Sample a completion of each prompt; return it without its end token.

        Args:
            prompts: texts or chat messages, but not both. A prompt that is too long for the base's context loses
                its oldest turns.
            role: `base`, `sft` or `policy`.
            max_new_tokens: largest number of tokens of a completion; the recipe's by default, else 128.
            temperature: sampling temperature; 0: the most likely token. The recipe's by default, else 1.
            seed: seed of the sampling.

        Raises:
            UserError: `prompts` is no list, a prompt is neither text nor messages, or the run has no such role.
        """
        (given,) = lists(prompts=prompts)
        contexts = [record(f"prompts[{index}]", prompt).context for index, prompt in enumerate(given)]
        return self.complete(contexts, role, max_new_tokens, temperature, seed)

    @property
    def max_new_tokens(self) -> int:
        """Default for the largest number of tokens of a completion: the recipe's, else 128."""
        return self.recipe.rl.max_new_tokens if self.recipe.rl is not None else 128

    @property
    def temperature(self) -> float:
        """Default sampling temperature: the recipe's, else 1."""
        return self.recipe.rl.temperature if self.recipe.rl is not None else 1.0

    def complete(
        self,
        contexts: Sequence[Context],
        role: str,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> list[str]:
        """Sample as `generate` does, from contexts of PERL's records."""
        return [one.text for one in self.draw(contexts, role, max_new_tokens, temperature, seed)]

    def draw(
        self,
        contexts: Sequence[Context],
        role: str,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> list[Completion]:
        """Sample as `complete` does; return token counts as well."""
        contexts = [asked(one, self.recipe.data.chat) for one in contexts]
        sampling = self._sampling(contexts, role, max_new_tokens, temperature)
        if not contexts:
            return []
        prompts, text = [self._prompt(one, sampling) for one in contexts], contexts[0][-1].speaker == "text"
        drawn: list[Completion] = []
        for start in range(0, len(prompts), BATCH):  # a prompt gets the same random numbers in any batch
            rows = [*range(start, min(start + BATCH, len(prompts)))]
            some, share = [prompts[row] for row in rows], Share(rows, len(prompts))
            drawn += self._draw(some, role, sampling, self._generator(seed), text, share)[0]
        return drawn

    def pieces(
        self,
        context: Context,
        role: str,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> Iterator[Completion]:
        """Yield one completion while it is sampled: the text so far after every `PIECE` tokens, then all of it."""
        context = asked(context, self.recipe.data.chat)
        sampling = self._sampling([context], role, max_new_tokens, temperature)
        prompt, generator = self._prompt(context, sampling), self._generator(seed)
        drawn, ended, text = list[int](), False, context[-1].speaker == "text"
        while not ended and len(drawn) < sampling.max_new_tokens:
            piece = replace(sampling, max_new_tokens=min(PIECE, sampling.max_new_tokens - len(drawn)))
            ((last,), (ids,)) = self._draw([prompt + drawn], role, piece, generator, text)
            drawn, ended = drawn + ids, last.ended
            decoded = self.session.base.chat.decode(drawn, prompt if text else ())
            yield Completion(decoded, ended, len(drawn), len(prompt))

    def _sampling(
        self, contexts: Sequence[Context], role: str, max_new_tokens: int | None, temperature: float | None
    ) -> Sampling:
        """Return how to sample completions of these contexts. Raises `UserError` if that is impossible."""
        max_new_tokens = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        temperature = self.temperature if temperature is None else temperature
        kinds = {context[-1].speaker == "text" for context in contexts}
        self._check(role, len(kinds), max_new_tokens, temperature)
        chat = self.session.base.chat
        ends = chat.ends(contexts[0]) if contexts else ()
        return Sampling(max_new_tokens, max(temperature, COLDEST), ends, chat.pad_id, MICRO_BATCH_SIZE)

    def _prompt(self, context: Context, sampling: Sampling) -> list[int]:
        room = self.session.base.context_length - sampling.max_new_tokens
        return self.session.base.chat.context(context, room)

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.session.device).manual_seed(derived_seed(seed, "generate", 0))

    def _draw(
        self,
        prompts: Sequence[list[int]],
        role: str,
        sampling: Sampling,
        generator: torch.Generator,
        text: bool,
        share: Share | None = None,
    ) -> tuple[list[Completion], list[list[int]]]:
        """Sample a completion of each prompt, plain text or a chat; return the completions and their tokens."""
        self.session.load(Role(role))
        self.session.roles.eval()
        samples = LocalSampler(self.session.roles).draw(Role(role), prompts, sampling, generator, share)
        ids, chat = samples.completions(), self.session.base.chat
        drawn = [
            Completion(chat.decode(one, prompt if text else ()), end, len(one), len(prompt))
            for one, end, prompt in zip(ids, samples.ended_B.tolist(), prompts, strict=True)
        ]
        return drawn, ids

    def _check(self, role: str, kinds: int, max_new_tokens: int, temperature: float) -> None:
        """Refuse requests that cannot be fulfilled."""
        if role not in self.policies:
            remedy = f"Roles of this run that generate: {', '.join(self.policies) or 'none'}."
            where = str(self.session.folder.path)
            raise UserError(f"the run has no role {role!r} that generates", where=where, remedy=remedy)
        if kinds > 1:
            raise UserError("the prompts are of two kinds, text and messages", remedy="Generate each separately.")
        if not 0 <= temperature < math.inf:
            remedy = "Give a positive number, or 0 for the most likely token."
            raise UserError(f"temperature is {temperature:g}", remedy=remedy)
        context_length = self.session.base.context_length
        if not 0 < max_new_tokens < context_length:
            what = f"max_new_tokens is {max_new_tokens}, but the base's context is {context_length} tokens"
            raise UserError(what, remedy="Leave room for a prompt and a completion.")

    def score(
        self, prompts: Iterable[str | Messages], completions: Iterable[str], *, probability: bool = False
    ) -> list[float]:
        """Return the reward model's score of each completion: log-odds if trained on thumbs, else Bradley-Terry.

        Args:
            prompts: texts or chat messages.
            probability: return the calibrated probability of `Score` instead: σ(slope · score + intercept),
                fitted on the run's held-out ratings; a model of pairs subtracts its mean training score first.

        Raises:
            UserError: the run has no finished reward model, there are more prompts than completions or fewer, or
                one of them cannot be read.
        """
        answers = []
        rows = zip(*lists(prompts=prompts, completions=completions), strict=True)
        for index, (prompt, completion) in enumerate(rows):
            rating = record(f"prompts[{index}]", prompt, completion=completion, label=True)
            assert isinstance(rating, Rating)
            answers.append((rating.context, rating.answer))
        return [one.probability if probability else one.score for one in self.score_answers(answers)]

    def score_answers(self, answers: Sequence[tuple[Context, Turn]]) -> list[Score]:
        """Score as `score` does, for contexts and answers of PERL's records."""
        if self.results.reward is None or self.recipe.reward is None:
            where, remedy = str(self.session.folder.path), "Run its recipe with a section reward."
            raise UserError("the run has no finished reward model", where=where, remedy=remedy)
        chat = self.session.base.chat
        length, as_chat = self.session.max_length("reward"), self.recipe.data.chat
        rows = [chat.row(asked(context, as_chat), answered(one, as_chat), length) for context, one in answers]
        scores_MN = run_member_scores(self.session, rows, MICRO_BATCH_SIZE)
        fitted, log_odds = self.results.reward.eval.calibration, scores_are_log_odds(self.session)
        scores_N = ensemble_scores(scores_MN, log_odds)
        average = float(zero_points(self.session).mean()) if self.results.reward.eval.compared else 0.0
        probabilities_N = probabilities(fitted.slope * (scores_N - average) + fitted.intercept)
        several = len(scores_MN) > 1
        differ = run_disagreement(self.session, scores_MN).tolist() if several else [None] * len(rows)
        return [Score(*one) for one in zip(scores_N.tolist(), probabilities_N.tolist(), differ, strict=True)]
