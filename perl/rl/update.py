"""How the policy and its critic learn from a rollout: minibatches, micro-batches, clipping, the schedule.

A minibatch is the whole rollout, so that there is one update for each pass over it; the gradients of its
micro-batches add up to its own, whatever their size.

Axis letters: B completions, T completion positions.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from perl.rl.algorithms import Algorithm, Targets
from perl.rl.batches import micro_batches, trim
from perl.rl.losses import Sizes
from perl.rl.rollout import Rollout
from perl.roles.roles import Role, Roles

MAX_GRAD_NORM = 1.0
"""Of each role's gradient."""


@dataclass(frozen=True)
class Learner:
    """The roles that learn, their optimizer, and how a step is taken."""

    roles: Roles
    algorithm: Algorithm
    trained: tuple[Role, ...]
    """The policy, and the critic where there is one."""
    optimizer: torch.optim.Optimizer
    rates: list[float]
    """The full learning rates of weights, at least one, and of heads at the end, as the optimizer's groups."""
    rate_shares: list[float]
    """Of the full rates, what each step has."""
    epochs: int
    """Passes over a rollout."""
    micro_batch_size: int
    temperature: float
    max_new_tokens: int
    checkpoint_activations: bool

    @property
    def critic(self) -> Role | None:
        """Who gives values."""
        return Role.CRITIC if Role.CRITIC in self.trained else None

    @property
    def shared_head(self) -> Role | None:
        """Whose head reads values on the policy's trunk; None where the critic has weights of its own."""
        return None if self.critic is None or self.roles.weights(self.critic) else self.critic

    def learning_rate(self, step: int) -> float:
        """Of weights, in this step."""
        return self.rates[0] * self.rate_shares[step]

    def update(self, step: int, local: Rollout, rollout: Rollout, targets: Targets) -> dict[str, float]:
        """One update a pass over the rollout; returns the last one's metrics.

        An update whose loss or gradient is not finite is refused: nothing has changed then, and `refused` is 1.

        Args:
            local: what this process learns from.
            rollout: of all processes.
            targets: of `rollout`.
        """
        processes = self.roles.engine.processes
        rows = processes.shard(len(rollout.rewards_B))
        learned_BT = targets.mask(rollout)
        completions = float(learned_BT.any(1).sum())
        sizes = Sizes(float(learned_BT.sum()), completions, self.max_new_tokens)
        targets = _take(targets, slice(rows[0], rows[-1] + 1), rollout.completion_length)
        tokens = float(rollout.completion_mask_BT.sum())
        sums: dict[str, float] = {}
        mismatch = 0.0
        for epoch in range(self.epochs):
            sums = dict.fromkeys(
                ("policy_loss", "value_loss", "entropy", "sampler_mismatch", "clip_fraction"), 0.0
            )
            for batch_rows in micro_batches(local, self.micro_batch_size):
                batch = trim(local, batch_rows)
                with self.roles.checkpointed(self.checkpoint_activations):
                    taken = _take(targets, batch_rows, batch.completion_length)
                    self._accumulate(batch, taken, sizes, tokens, sums)
            processes.all_reduce_gradients(self.roles.parameters_of(*self.trained))
            sums = {name: processes.all_reduce_sum(value) for name, value in sums.items()}
            # Only before the first update is the policy the one that sampled: there they must agree.
            mismatch = sums["sampler_mismatch"] if epoch == 0 else mismatch
            if not self._optimize(step, sums):
                sums["refused"] = 1.0
                break
        return sums | {"sampler_mismatch": mismatch, "learning_rate": self.learning_rate(step)}

    def _accumulate(
        self, batch: Rollout, targets: Targets, sizes: Sizes, tokens: float, sums: dict[str, float]
    ) -> None:
        """Add the gradients of one micro-batch, and its share of the metrics, which are of all its tokens."""
        read = partial(
            self.roles,
            ids_BL=batch.ids_BL,
            mask_BL=batch.mask_BL,
            completion_length=batch.completion_length,
            lower_hidden_BLD=batch.lower_hidden_BLD,
        )
        outputs = read(
            Role.POLICY,
            temperature=self.temperature,
            head=self.shared_head,
            trunk_gradient=self.algorithm.value_coef,
        )
        policy_loss, clipped = self.algorithm.policy_loss(outputs, batch, targets, sizes)
        loss = policy_loss
        if self.critic is not None:
            if self.shared_head is None:
                outputs = outputs._replace(values_BT=read(self.critic, head=self.critic).values_BT)
            value_loss = self.algorithm.value_loss(outputs, batch, targets, sizes)
            loss = loss + value_loss
            sums["value_loss"] += float(value_loss.detach())
        loss.backward()  # type: ignore[no-untyped-call]
        sums["policy_loss"] += float(policy_loss.detach())
        sums["clip_fraction"] += float(clipped) if clipped is not None else 0.0
        sums["entropy"] += float(outputs.entropy_BT.detach().sum()) / tokens
        gap_BT = (outputs.log_probs_BT.detach() - batch.sampler_log_probs_BT).abs()
        sums["sampler_mismatch"] += float(gap_BT.masked_fill(~batch.completion_mask_BT, 0.0).sum()) / tokens

    def _optimize(self, step: int, sums: dict[str, float]) -> bool:
        """Clip the gradients and take the optimizer's step; whether loss and gradients were finite."""
        groups = [self.roles.parameters_of(role) for role in self.trained]
        norms = [float(torch.nn.utils.clip_grad_norm_(group, MAX_GRAD_NORM)) for group in groups]
        sums["grad_norm"] = max(norms)
        finite = all(math.isfinite(value) for value in (*norms, sums["policy_loss"], sums["value_loss"]))
        if finite:
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=False):
                group["lr"] = rate * self.rate_shares[step]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return finite


def _take(targets: Targets, rows: list[int] | slice, length: int) -> Targets:
    """The targets of these rows, as many columns."""

    def of(value_BT: Tensor | None) -> Tensor | None:
        return None if value_BT is None else value_BT[rows, :length]

    return targets._replace(
        advantages_BT=targets.advantages_BT[rows, :length],
        returns_BT=of(targets.returns_BT),
        learned_BT=of(targets.learned_BT),
    )
