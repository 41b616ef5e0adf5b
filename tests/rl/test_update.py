"""The minibatches of an update."""

from types import SimpleNamespace
from typing import Any, cast

import torch

from perl.rl.algorithm import Targets
from perl.rl.algorithms import ALGORITHMS
from perl.rl.losses import Sizes
from perl.rl.update import Learner, _Minibatch
from tests.rl.rollouts import rollout


def test_a_process_whose_groups_are_all_dropped_adds_nothing_to_the_sizes() -> None:
    """The other process trains on 6 tokens and 4 completions of each minibatch of 6 tokens."""
    others = iter([6.0, 4.0, 6.0] * 2)
    everyone = SimpleNamespace(all_reduce_sum=lambda number: number + next(others))
    learner = Learner(
        roles=cast(Any, SimpleNamespace(engine=SimpleNamespace(processes=everyone))),
        algorithm=ALGORITHMS["dapo"],
        trained=(),
        optimizer=cast(Any, None),
        rates=[],
        rate_shares=[],
        epochs=1,
        minibatches=2,
        seed=0,
        micro_batch_size=1,
        temperature=1.0,
        max_new_tokens=8,
        checkpoint_activations=False,
    )
    targets = Targets(torch.zeros(4, 2), None, torch.zeros(4, 2).bool())
    whole = _Minibatch(rollout(), targets, Sizes(1.0, 1.0, 8), 1.0)
    assert [minibatch.sizes for minibatch in learner._minibatches(0, whole)] == [Sizes(6.0, 4.0, 8)] * 2
