"""A user-defined function as reward."""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from perl.backbones.template import MESSAGE_ROLES
from perl.data.records import Context, Prompt
from perl.errors import UserError
from perl.rl.rewards.base import RewardSource
from perl.rl.rewards.limits import FunctionProcess, limited, result
from perl.rl.samplers.base import Samples
from perl.system.python_file import import_function

OWN = ("prompts", "completions", "completion_ids")
"""Arguments that describe the completions; a column of the same name would replace them."""


class RewardFunction(RewardSource):
    """A function `FILE.py:NAME`, called like TRL's reward functions.

    It receives `prompts`, `completions`, `completion_ids` and the rows' columns with other names, each a list with
    one entry per completion (chat prompts as lists of messages), and returns a list of numbers.

    Args:
        location: `FILE.py:NAME`.
        prompts: all prompts with which it will be called; it receives every column that at least one of them has.
        time_limit: seconds per call.
        own_process: whether it is called in a separate process, which is restarted after a failure.

    Raises:
        UserError: the file or name does not exist, or the function does not accept these arguments; when called,
            as `RewardSource`.
    """

    title = "the reward function"

    def __init__(
        self,
        location: str,
        prompts: Sequence[Prompt],
        time_limit: float | None = None,
        own_process: bool = False,
    ) -> None:
        self._location = location
        with _torch_as_it_was():
            self._function = import_function(location)
        self._time_limit = time_limit
        self._process = FunctionProcess(location) if own_process else None
        self._columns = sorted({name for prompt in prompts for name in prompt.columns} - set(OWN))
        self.name = location.rpartition(":")[2]
        self._check_signature()

    @property
    def where(self) -> str:
        return self._location

    @property
    def file(self) -> Path:
        return Path(self._location.rpartition(":")[0]).absolute()

    def rewards(self, prompts: Sequence[Prompt], samples: Samples, texts: Sequence[str]) -> Sequence[float]:
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in self._columns}
        chat = [prompt.context[-1].speaker != "text" for prompt in prompts]
        arguments = {
            "prompts": [messages(prompt.context) for prompt in prompts],
            "completions": [
                [{"role": "assistant", "content": text}] if is_chat else text
                for text, is_chat in zip(texts, chat, strict=True)
            ],
            "completion_ids": samples.completions(),
            **columns,
        }
        returned: Sequence[float]
        if self._process is not None:
            returned = self._process.call(arguments, self._time_limit)
        else:
            with limited(self._time_limit), _torch_as_it_was():
                returned = result(self._function, **arguments)
        return returned

    def _check_signature(self) -> None:
        """Refuse a function that cannot be called with these arguments, before a model is loaded."""
        try:
            signature = inspect.signature(self._function)
        except ValueError:  # written in C
            return
        names = (*OWN, *self._columns)
        try:
            signature.bind(**dict.fromkeys(names))
        except TypeError as error:
            raise UserError(
                f"the reward function cannot be called with {', '.join(names)}: {error}",
                where=self._location,
                remedy="Let it accept prompts, completions, completion_ids and **kwargs.",
            ) from None


@contextlib.contextmanager
def _torch_as_it_was() -> Iterator[None]:
    """Restore torch's global settings, which files with a model of their own change: training needs gradients."""
    dtype = torch.get_default_dtype()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        torch.set_default_dtype(dtype)


def messages(context: Context) -> str | list[dict[str, str]]:
    """Return a context in TRL's format of prompts: text, or chat messages."""
    if context[-1].speaker == "text":
        return "".join(turn.text for turn in context)
    return [{"role": MESSAGE_ROLES[turn.speaker], "content": turn.text} for turn in context]
