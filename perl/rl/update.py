"""Updates of the policy and its critic from a rollout: minibatches, micro-batches, clipping, the schedule.

A minibatch is the whole rollout unless the recipe asks for several. The gradients of its micro-batches add up to
its own, whatever their size.

Axis letters: B completions, T completion positions.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import get_scheduler

from perl.rl.algorithm import Algorithm, Targets
from perl.rl.batches import micro_batches, trim
from perl.rl.losses import Sizes
from perl.rl.natural_gradient import adams_moments
from perl.rl.rollout import Rollout
from perl.rl.trust_region import TrustRegion
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.system.seeds import derived_seed

MAX_GRAD_NORM = 1.0
"""Maximum norm of each role's gradient."""
METRICS = ("policy_loss", "value_loss", "entropy", "sampler_mismatch", "clip_fraction")
"""The metrics to which each micro-batch adds its share."""
MEANS = ("entropy", "sampler_mismatch")
"""Those of `METRICS` that are means over the minibatch's tokens."""


class _Minibatch(NamedTuple):
    """The data of one update."""

    batch: Rollout
    targets: Targets
    sizes: Sizes
    tokens: float
    """Number of tokens of all its completions, in all processes."""


@dataclass(frozen=True)
class Learner:
    """The trained roles, their optimizer, and the settings of an update."""

    roles: Roles
    algorithm: Algorithm
    trained: tuple[Role, ...]
    """The policy, and the critic where there is one."""
    optimizer: torch.optim.Optimizer
    rates: list[float]
    """Full learning rates of the optimizer's groups: at least one for weights, then those for heads."""
    rate_shares: list[float]
    """The share of the full rates that each step uses."""
    epochs: int
    """Passes over a rollout."""
    minibatches: int
    """Updates per pass."""
    seed: int
    micro_batch_size: int
    temperature: float
    max_new_tokens: int
    checkpoint_activations: bool

    @property
    def critic(self) -> Role | None:
        """The role that predicts values, if any."""
        return Role.CRITIC if Role.CRITIC in self.trained else None

    @property
    def shared_head(self) -> Role | None:
        """The critic if it is a head on the policy's trunk; None if it has its own weights or there is none."""
        return None if self.critic is None or self.roles.weights(self.critic) else self.critic

    @property
    def step_size(self) -> tuple[str, float]:
        """The key of section `rl` that sets the size of the policy's steps, and its value."""
        if self.algorithm.direction == "natural":
            assert self.algorithm.trust_region is not None
            return "trust_region", self.algorithm.trust_region
        return "learning_rate", self.rates[0]

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of weights in this step."""
        return self.rates[0] * self.rate_shares[step]

    def update(self, step: int, local: Rollout, rollout: Rollout, targets: Targets) -> dict[str, float]:
        """Take one update per minibatch in each pass over the rollout; return the last update's metrics.

        An update whose loss or gradient is not finite is refused: it changes nothing, and `refused` is 1.

        Args:
            local: this process's share of the rollout.
            rollout: the rollout of all processes.
            targets: the targets of `rollout`.
        """
        if self.algorithm.reset_optimizer:
            reset(self.optimizer)
        rows = self.roles.engine.processes.shard(len(rollout.rewards_B))
        taken = targets.take(slice(rows[0], rows[-1] + 1), rollout.completion_length)
        whole = _Minibatch(local, taken, self._sizes(*_counts(rollout, targets)), _tokens(rollout))
        region = self._trust_region(local, taken)
        sums: dict[str, float] = {}
        mismatch: float | None = None
        for minibatch in self._minibatches(step, whole):
            sums = self._read(minibatch, self._gradients(minibatch))
            # Policy and sampler must agree only before the first update, while the policy is the one that sampled.
            mismatch = sums["sampler_mismatch"] if mismatch is None else mismatch
            if not self._optimize(step, sums, region):
                sums["refused"] = 1.0
                break
        assert mismatch is not None
        held = {} if region is None else region.search()
        return sums | held | {"sampler_mismatch": mismatch, "learning_rate": self.learning_rate(step)}

    def _minibatches(self, step: int, whole: _Minibatch) -> Iterator[_Minibatch]:
        """Yield each update's share of this process's completions, with the sizes over all processes."""
        count, everyone = len(whole.batch.texts), self.roles.engine.processes.all_reduce_sum
        for epoch in range(self.epochs):
            if self.minibatches == 1:
                yield whole
                continue
            generator = random.Random(derived_seed(self.seed, f"minibatches {epoch}", step))
            order = generator.sample(range(count), count)
            for part in range(min(self.minibatches, count)):
                rows = order[part :: self.minibatches]
                batch, targets = whole.batch.take(rows), whole.targets.take(rows, whole.batch.completion_length)
                sizes = self._sizes(*map(everyone, _counts(batch, targets)))
                yield _Minibatch(batch, targets, sizes, everyone(_tokens(batch)))

    def _sizes(self, tokens: float, completions: float) -> Sizes:
        """Return the divisors of a minibatch's losses; at least 1, because there may be no tokens to train on."""
        return Sizes(max(1.0, tokens), max(1.0, completions), self.max_new_tokens)

    def _gradients(self, minibatch: _Minibatch) -> list[Tensor]:
        """Accumulate a minibatch's gradients over all processes; return `METRICS` of each micro-batch."""
        found = []
        for rows in micro_batches(minibatch.batch, self.micro_batch_size):
            batch = trim(minibatch.batch, rows)
            with self.roles.checkpointed(self.checkpoint_activations):
                taken = minibatch.targets.take(rows, batch.completion_length)
                found.append(self._accumulate(batch, taken, minibatch.sizes))
        self.roles.engine.processes.all_reduce_gradients(self.roles.parameters_of(*self.trained))
        return found

    def _read(self, minibatch: _Minibatch, found: list[Tensor]) -> dict[str, float]:
        """Clip the gradients and return the metrics of a minibatch over all processes.

        All values are read from a GPU at once, because each read makes the host wait.

        Args:
            found: the result of `_gradients`.
        """
        groups = [self.roles.parameters_of(role) for role in self.trained]
        norms = torch.stack([torch.nn.utils.clip_grad_norm_(group, MAX_GRAD_NORM) for group in groups])
        values = torch.cat([*found, norms.double()]).tolist()
        width, end = len(METRICS), len(METRICS) * len(found)
        sums: dict[str, float] = {}
        for place, name in enumerate(METRICS):
            total = sum(value / (minibatch.tokens if name in MEANS else 1.0) for value in values[place:end:width])
            sums[name] = self.roles.engine.processes.all_reduce_sum(total)
        sums["grad_norm"] = max(values[end:]) if all(map(math.isfinite, values[end:])) else math.nan
        return sums

    def _trust_region(self, local: Rollout, targets: Targets) -> TrustRegion | None:
        """Return the trust region of this step, if the algorithm has one; `targets` belong to `local`."""
        if self.algorithm.trust_region is None:
            return None
        return TrustRegion(
            roles=self.roles,
            algorithm=self.algorithm,
            local=local,
            targets=targets,
            limit=self.algorithm.trust_region,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            micro_batch_size=self.micro_batch_size,
            checkpoint_activations=self.checkpoint_activations,
        )

    def _accumulate(self, batch: Rollout, targets: Targets, sizes: Sizes) -> Tensor:
        """Add the gradients of one micro-batch; return its share of `METRICS`, fp64."""
        read = partial(
            self.roles,
            ids_BL=batch.ids_BL,
            mask_BL=batch.mask_BL,
            completion_length=batch.completion_length,
            lower_hidden_BLD=batch.lower_hidden_BLD,
            prompts=batch.shared_prompts,
            lengths=batch.completion_lengths,
        )
        outputs = read(
            Role.POLICY,
            temperature=self.temperature,
            head=self.shared_head,
            trunk_gradient=self.algorithm.value_coef,
        )
        policy_loss, clipped = self.algorithm.policy_loss(outputs, batch, targets, sizes)
        loss, value_loss = policy_loss, torch.zeros_like(policy_loss)
        if self.critic is not None:
            if self.shared_head is None:
                outputs = outputs._replace(values_BT=read(self.critic, head=self.critic).values_BT)
            value_loss = self.algorithm.value_loss(outputs, batch, targets, sizes)
            loss = loss + value_loss
        loss.backward()  # type: ignore[no-untyped-call]
        gap_BT = (outputs.log_probs_BT.detach() - batch.sampler_log_probs_BT).abs()
        found = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": outputs.entropy_BT.sum(),
            "sampler_mismatch": gap_BT.masked_fill(~batch.completion_mask_BT, 0.0).sum(),
            "clip_fraction": torch.zeros_like(policy_loss) if clipped is None else clipped,
        }
        return torch.stack([found[name].detach().double() for name in METRICS])

    def _optimize(self, step: int, sums: dict[str, float], region: TrustRegion | None) -> bool:
        """Take the optimizer's step if loss and gradients are finite; return whether they were."""
        finite = all(math.isfinite(sums[name]) for name in ("grad_norm", "policy_loss", "value_loss"))
        if finite:
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=False):
                group["lr"] = rate * self.rate_shares[step]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if finite and region is not None and self.algorithm.direction == "natural":
            # It replaces the optimizer's step of the policy, of which only the moments remain.
            region.natural_step(adams_moments(self.optimizer, region.parameters), self.rate_shares[step])
        return finite


def _tokens(batch: Rollout) -> float:
    return float(sum(batch.completion_lengths))


def _counts(batch: Rollout, targets: Targets) -> tuple[float, float]:
    """Return the numbers of tokens and of completions that are trained on."""
    learned_BT = targets.learned_BT
    if learned_BT is None:
        return _tokens(batch), float(sum(length > 0 for length in batch.completion_lengths))
    tokens, completions = torch.stack([learned_BT.sum(), learned_BT.any(1).sum()]).tolist()
    return float(tokens), float(completions)


def reset(optimizer: torch.optim.Optimizer) -> None:
    """Reset an optimizer's moments, so that its next step is like its first; sharded optimizers wrap another."""
    for one in (optimizer, getattr(optimizer, "optim", optimizer)):
        one.state.clear()


def learning_rate_shares(name: str, warmup_ratio: float, steps: int) -> list[float]:
    """Return each step's share of the full learning rate, by transformers' schedule of that name.

    The shares are computed once and indexed by step, so that there is no scheduler state to save.
    """
    warmup = round(warmup_ratio * steps)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup + 1, num_training_steps=steps + 1)
    shares = []
    for _ in range(steps):
        optimizer.step()  # changes nothing without a gradient; the schedule expects to be called after it
        schedule.step()
        shares.append(float(schedule.get_last_lr()[0]))
    return shares
