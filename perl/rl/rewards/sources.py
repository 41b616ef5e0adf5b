"""Where the reward of an answer comes from: the reward adapter, or a function of the user's own.

Both are called with prompts and their answers and give one score each.
"""

import importlib.util
import inspect
import math
import reprlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from perl.backbones.padding import left_pad
from perl.backbones.template import MESSAGE_ROLES
from perl.data.records import Context, Prompt
from perl.errors import UserError
from perl.rl.batches import micro_batches, trim
from perl.rl.samplers.base import Samples
from perl.roles.roles import Role, Roles
from perl.roles.saved import Stamp
from perl.system.progress import counted

LARGEST_REWARD = 1e30
"""In size. Rewards are kept in fp32, which ends at 3e38, and their spread is a sum of squares."""


class RewardSource(Protocol):
    """Scores answers to prompts."""

    def __call__(
        self,
        prompts: Sequence[Prompt],
        samples: Samples,
        texts: Sequence[str],
    ) -> list[float]:
        """One finite score an answer."""


class RewardModel:
    """The reward adapter's reward, centred and scaled to unit spread on its training rows.

    Of a model of thumbs the reward is the probability of a thumb up, not its log-odds: unbounded log-odds pay the
    policy for making sure answers surer still (docs/experiments.md).

    Args:
        stamp: of the reward adapter; it holds mean and spread.
        micro_batch_size: rows scored at once.
        ends: what ends answers; the first is the one that its training rows end with.
    """

    def __init__(self, roles: Roles, stamp: Stamp, micro_batch_size: int, ends: tuple[int, ...]) -> None:
        self._roles, self._stamp, self._micro_batch_size, self._ends = roles, stamp, micro_batch_size, ends

    def __call__(
        self,
        prompts: Sequence[Prompt],
        samples: Samples,
        texts: Sequence[str],
    ) -> list[float]:
        """Rewards of the answers."""
        scores = self.scores(samples)
        rewards = probabilities(scores) if self._stamp.reward_is_probability else scores
        return [(reward - self._stamp.reward_mean) / self._stamp.reward_std for reward in rewards]

    @torch.no_grad()
    def scores(self, samples: Samples) -> list[float]:
        """Scores of prompt and answer together, read at the answer's last token.

        An answer that ended with another end token than the training rows is read as if it ended with theirs: of
        others the reward model knows nothing.
        """
        scores = [0.0] * len(samples.ids_BL)
        samples = with_written_end(samples, self._ends)
        for rows in micro_batches(samples, self._micro_batch_size):
            batch = trim(samples, rows)
            outputs = self._roles(
                Role.REWARD, batch.ids_BL, batch.mask_BL, head=Role.REWARD, lower_hidden_BLD=batch.lower_hidden_BLD
            )
            for row, score in zip(rows, outputs.scores_B.tolist(), strict=True):
                scores[row] = score
        return scores


def with_written_end(samples: Samples, ends: tuple[int, ...]) -> Samples:
    """Samples whose answers, where they ended, end with the first of the end tokens."""
    if not ends[1:]:
        return samples
    others = torch.tensor(ends[1:], dtype=torch.int64, device=samples.ids_BL.device)
    lengths_B1 = torch.tensor(samples.completion_lengths, device=samples.ids_BL.device)[:, None]
    last_B1 = samples.ids_BL.shape[1] - samples.completion_length + lengths_B1 - 1
    ids_B1 = samples.ids_BL.gather(1, last_B1)
    changed_B1 = torch.isin(ids_B1, others)
    if not bool(changed_B1.any()):
        return samples
    ids_BL = samples.ids_BL.scatter(1, last_B1, ids_B1.masked_fill(changed_B1, ends[0]))
    # What the shared blocks made is of the tokens drawn.
    return replace(samples, ids_BL=ids_BL, lower_hidden_BLD=None)


def probabilities(scores: Sequence[float]) -> list[float]:
    """Log-odds as probabilities."""
    chances: list[float] = torch.tensor(scores, dtype=torch.float64).sigmoid().tolist()
    return chances


@torch.no_grad()
def score_rows(roles: Roles, rows: Sequence[list[int]], pad_id: int, micro_batch_size: int) -> list[float]:
    """The reward adapter's score of each row of tokens, as trained; rows of like length are read together."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    scores = [0.0] * len(rows)
    for start in range(0, len(order), micro_batch_size):
        chosen = order[start : start + micro_batch_size]
        ids_BL, mask_BL = left_pad([rows[index] for index in chosen], pad_id, roles.device)
        outputs = roles(Role.REWARD, ids_BL, mask_BL, head=Role.REWARD)
        for index, score in zip(chosen, outputs.scores_B.tolist(), strict=True):
            scores[index] = score
    return scores


class RewardFunction:
    """A function `FILE.py:NAME`, called as TRL calls its reward functions.

    It receives `prompts`, `completions`, `completion_ids` and the further columns of the rows, each a list with
    an entry a completion (chat prompts as lists of messages), and returns a list of numbers.

    Args:
        location: `FILE.py:NAME`.
        prompts: all that it will be called with; it receives every column that one of them has.

    Raises:
        UserError: no such file or name, or a function that cannot be called so; or, when called, an exception
            inside, another count of scores, or a score that is no finite number of at most `LARGEST_REWARD`.
    """

    def __init__(self, location: str, prompts: Sequence[Prompt]) -> None:
        self._location = location
        self._function = _import(location)
        self._columns = sorted({name for prompt in prompts for name in prompt.columns})
        self._check_signature()

    def __call__(
        self,
        prompts: Sequence[Prompt],
        samples: Samples,
        texts: Sequence[str],
    ) -> list[float]:
        """The function's scores, checked."""
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in self._columns}
        chat = [prompt.context[-1].speaker != "text" for prompt in prompts]
        try:
            returned = self._function(
                prompts=[messages(prompt.context) for prompt in prompts],
                completions=[
                    [{"role": "assistant", "content": text}] if is_chat else text
                    for text, is_chat in zip(texts, chat, strict=True)
                ],
                completion_ids=samples.completions(),
                **columns,
            )
        except (Exception, SystemExit) as error:  # the user's own code
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"the reward function failed: {type(error).__name__}: {error}",
                where=f"{frame.filename}:{frame.lineno}",
                remedy="Mend the function; no completion is scored 0 for a failure.",
            ) from error
        return self._check(returned, len(prompts))

    def _check_signature(self) -> None:
        """Refuse what cannot be called with these names, before a model is loaded."""
        if inspect.iscoroutinefunction(self._function):
            raise UserError(
                "the reward function is async; it must return its scores, not a coroutine",
                where=self._location,
                remedy="Write it with def, and call asyncio.run inside where something must be awaited.",
            )
        try:
            signature = inspect.signature(self._function)
        except ValueError:  # written in C
            return
        names = ("prompts", "completions", "completion_ids", *self._columns)
        try:
            signature.bind(**dict.fromkeys(names))
        except TypeError as error:
            raise UserError(
                f"the reward function cannot be called with {', '.join(names)}: {error}",
                where=self._location,
                remedy="Let it accept prompts, completions, completion_ids and **kwargs.",
            ) from None

    def _check(self, returned: Any, count: int) -> list[float]:
        """The numbers of a list of so many; arrays, tensors and booleans count as numbers do."""
        try:
            scores = None if isinstance(returned, str | bytes | Mapping) else list(returned)
        except TypeError:  # nothing that has items
            scores = None
        if scores is None:
            raise self._misfit(count, f"it returned {type(returned).__name__} {reprlib.repr(returned)}")
        if len(scores) != count:
            raise self._misfit(count, f"it returned {len(scores)} of {count}: {reprlib.repr(scores)}")
        numbers = [_number(score) for score in scores]
        for row, (score, number) in enumerate(zip(scores, numbers, strict=True)):
            if not math.isfinite(number):
                raise self._misfit(count, f"score {row} is {reprlib.repr(score)}")
            if abs(number) > LARGEST_REWARD:
                raise UserError(
                    f"score {row} of the reward function is {number:g}; at most {LARGEST_REWARD:g} in size can be "
                    "reckoned with",
                    where=self._location,
                    remedy="Divide all rewards by a constant: training scales them to unit spread in any case.",
                )
        return numbers

    def _misfit(self, count: int, what: str) -> UserError:
        return UserError(
            f"the reward function must return {counted(count, 'finite number')}, one a completion; {what}",
            where=self._location,
            remedy="Return a list of floats.",
        )


def _number(score: Any) -> float:
    """A score as a number; NaN where it is none, as a string is, whatever it says."""
    try:
        return math.nan if isinstance(score, str | bytes) else float(score)
    except OverflowError:  # a whole number that no float holds
        return math.inf if score > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def messages(context: Context) -> str | list[dict[str, str]]:
    """A context as TRL writes prompts: text, or chat messages."""
    if context[-1].speaker == "text":
        return "".join(turn.text for turn in context)
    return [{"role": MESSAGE_ROLES[turn.speaker], "content": turn.text} for turn in context]


def _import(location: str) -> Callable[..., Any]:
    file, _, name = location.rpartition(":")
    remedy = "Give FILE.py:NAME, the file beside the recipe."
    if not (file.endswith(".py") and Path(file).is_file()):
        raise UserError("no such Python file", where=f"rl.reward.function {location}", remedy=remedy)
    spec = importlib.util.spec_from_file_location(f"reward_function_{Path(file).stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own code
        raise UserError(
            f"cannot be imported: {type(error).__name__}: {error}", where=file, remedy="Mend the file."
        ) from error
    function: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"has no function {name!r}", where=file, remedy=remedy)
    return function
