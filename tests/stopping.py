"""Training that is interrupted in the middle."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def stopped_after(trainer: type, calls: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Interrupt a run inside this context after `calls` losses of this trainer; fail if that does not happen."""
    compute, done = vars(trainer)["compute_loss"], 0

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        if done > calls:
            raise KeyboardInterrupt
        return compute(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "compute_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield
