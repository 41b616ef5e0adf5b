"""A trust region: no step moves the policy further than a KL of δ, measured exactly over the vocabulary.

After a step of any kind, the policy is compared with the old one on a probe, some completions of the rollout.
While the mean KL(π_old‖π) is above δ, the weights move back towards the old ones on a straight line: a
backtracking line search, which is affordable for adapters of a few megabytes.

TRPO (Schulman et al. 2015, arXiv 1502.05477, appendix C) also takes the step along the natural gradient, and its
line search additionally requires that the loss does not rise by more than its standard error: the probe is small,
and in bf16 rounding alone changes the loss of a short step.

Axis letters: `perl.roles`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perl.rl.algorithm import Algorithm, Targets
from perl.rl.batches import micro_batches, trim
from perl.rl.losses import Sizes
from perl.rl.natural_gradient import Fisher, Moments, add, natural_direction, set_to, take_gradient
from perl.rl.rollout import Rollout
from perl.roles.log_probs import places
from perl.roles.outputs import Outputs
from perl.roles.role import Role
from perl.roles.roles import Roles

COMPLETIONS = 8
"""Completions of the probe, in each process. Fisher-vector products use every other one, because a fraction of the
rollout is enough for the curvature (ibid., appendix C.1)."""
ITERATIONS = 3
"""Iterations of conjugate gradients; with this damping, more of them change little."""
DAMPING = 1.0
"""Equal to the curvature along the gradient: with a tenth of it, the step followed the noise of 16 completions
along directions of little curvature, and gained half as much at the same KL (docs/experiments.md)."""
DIFFERENCE = 4.0
"""KL of the difference from which the curvature is taken, relative to δ: in bf16, rounding alone gives a KL of 2
to 4 · 10⁻⁴ nats per token."""
BACKTRACKS = 10
"""Number of shorter steps that are tried before the step is undone."""
SHORT, LENGTHS = 0.7, 4
"""A natural step whose KL is below this share of δ is lengthened, and at most this often."""
SHORTEST, LONGEST = 0.1, 0.8
"""Smallest and largest factor of the length in one backtrack."""


@dataclass(frozen=True)
class Probed:
    """The current policy on the probe."""

    kl: float
    """Mean KL(π_old‖π), nats per token."""
    loss: float
    """The algorithm's loss."""


@dataclass(frozen=True)
class _Part:
    """A micro-batch of the probe."""

    batch: Rollout
    targets: Targets
    old_ND: Tensor
    """The old policy's hidden states of the completions' tokens."""
    old_loss: float
    """The loss of the old policy."""


@dataclass
class TrustRegion:
    """The trust region of one step, created before its first update.

    Args:
        local: this process's share of the rollout.
        targets: the targets of `local`.
        limit: δ, nats per token.
    """

    roles: Roles
    algorithm: Algorithm
    local: Rollout
    targets: Targets
    limit: float
    temperature: float
    max_new_tokens: int
    micro_batch_size: int
    checkpoint_activations: bool

    def __post_init__(self) -> None:
        self._old = [parameter.detach().clone() for parameter in self.parameters]
        count = len(self.local.texts)
        probed = list(range(0, count, max(1, count // COMPLETIONS)))[:COMPLETIONS]
        everyone = self.roles.engine.processes.all_reduce_sum
        mask_BT, learned_BT = self.local.completion_mask_BT[probed], self.targets.mask(self.local)[probed]
        self._tokens = everyone(float(mask_BT.sum()))
        learned, completions = everyone(float(learned_BT.sum())), everyone(float(learned_BT.any(1).sum()))
        self._sizes = Sizes(max(learned, 1.0), max(completions, 1.0), self.max_new_tokens)
        self._fisher = self._micro_batches(probed[::2])
        self._parts = self._fisher + self._micro_batches(probed[1::2])
        self._fisher_tokens = everyone(float(sum(len(part.old_ND) for part in self._fisher)))
        natural = self.algorithm.direction == "natural"
        self._old_loss = everyone(sum(part.old_loss for part in self._parts)) if natural else math.inf
        # The standard error of the loss's change at a KL of 1: see `_is_no_worse`.
        squares = everyone(float((self.targets.advantages_BT[probed] * learned_BT).double().square().sum()))
        self._noise = math.sqrt(2 * squares) / self._sizes.tokens

    @torch.no_grad()
    def _micro_batches(self, probed: list[int]) -> list[_Part]:
        """Return these rows in micro-batches, with the outputs of the current policy."""
        if not probed:  # the process has a single completion
            return []
        batch = self.local.take(probed)
        targets, parts = self.targets.take(probed, batch.completion_length), []
        for rows in micro_batches(batch, self.micro_batch_size):
            part = trim(batch, rows)
            taught = targets.take(rows, part.completion_length)
            outputs = self._read(part, self.temperature)
            loss = self.algorithm.policy_loss(outputs, part, taught, self._sizes)[0]
            parts.append(_Part(part, taught, _states_ND(outputs, part), float(loss)))
        return parts

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The policy's parameters."""
        return self.roles.parameters_of(Role.POLICY)

    @torch.no_grad()
    def probe(self) -> Probed:
        """Compare the current policy with the old one; all processes must call this together."""
        found = []
        for part in self._parts:
            outputs = self._read(part.batch, self.temperature)
            loss, _ = self.algorithm.policy_loss(outputs, part.batch, part.targets, self._sizes)
            found.append(torch.stack([self._kl_N(outputs, part).sum(), loss]).double())
        kl, loss = (sum(values) for values in zip(*torch.stack(found).tolist(), strict=True))
        everyone = self.roles.engine.processes.all_reduce_sum
        return Probed(everyone(kl) / self._tokens, everyone(loss))

    def kl_gradient(self) -> tuple[float, Tensor]:
        """Return the current policy's mean KL on half the probe, nats per token, and its gradient, flat."""
        total, processes = 0.0, self.roles.engine.processes
        for part in self._fisher:
            with self.roles.checkpointed(self.checkpoint_activations):
                kl = self._kl_N(self._read(part.batch), part).sum() / self._fisher_tokens
                kl.backward()  # type: ignore[no-untyped-call]
            total += float(kl.detach())
        processes.all_reduce_gradients(self.parameters)
        return processes.all_reduce_sum(total), take_gradient(self.parameters)

    def natural_step(self, moments: Moments, share: float) -> None:
        """Move the policy from its old weights along -x until the KL is slightly less than δ.

        The length is measured rather than derived from the curvature, which is too imprecise in bf16.

        Args:
            moments: of the loss's gradients; x is the natural gradient of their mean.
            share: share of that length that is taken, before it is multiplied by the moments' weight.
        """
        set_to(self.parameters, self._old)
        fisher = Fisher(self.parameters, self.kl_gradient, DIFFERENCE * self.limit)
        x = natural_direction(fisher.product, moments.mean, moments.sizes, ITERATIONS, DAMPING)
        if not x.any():
            return
        length = float(fisher.length / x.norm()) / math.sqrt(DIFFERENCE)
        for _ in range(LENGTHS):
            add(self.parameters, x, -length)
            kl = self.probe().kl
            set_to(self.parameters, self._old)
            if SHORT * self.limit <= kl <= self.limit:
                break
            length *= min(1 / SHORTEST, _fitting(kl, self.limit))
        add(self.parameters, x, -share * moments.weight * length)

    def search(self) -> dict[str, float]:
        """Shorten the step until it is within the region, or undo it; return metrics."""
        new = [parameter.detach().clone() for parameter in self.parameters]
        share, backtracks, found = 1.0, 0, self.probe()
        while share and not (found.kl <= self.limit and self._is_no_worse(found)):
            backtracks += 1
            share = share * min(LONGEST, _fitting(found.kl, self.limit)) if backtracks <= BACKTRACKS else 0.0
            self._go_back_to(share, new)
            found = self.probe()
        return {
            "step_kl": found.kl,
            "step_kl_limit": self.limit,
            "step_share": share,
            "backtracks": float(backtracks),
        }

    def _is_no_worse(self, found: Probed) -> bool:
        """Return whether the loss has not risen by more than its standard error.

        If log-probs change by d, a token's loss changes by about -A d, and the KL is about half the mean of d².
        """
        return found.loss <= self._old_loss + self._noise * math.sqrt(max(0.0, found.kl))

    def _go_back_to(self, share: float, new: Sequence[Tensor]) -> None:
        set_to(self.parameters, [torch.lerp(old, end, share) for old, end in zip(self._old, new, strict=True)])

    def _read(self, batch: Rollout, temperature: float | None = None) -> Outputs:
        outputs: Outputs = self.roles(
            Role.POLICY,
            batch.ids_BL,
            batch.mask_BL,
            completion_length=batch.completion_length,
            temperature=temperature,
            lower_hidden_BLD=batch.lower_hidden_BLD,
            states=True,
        )
        return outputs

    def _kl_N(self, outputs: Outputs, part: _Part) -> Tensor:
        return self.roles.kl_of_states(part.old_ND, _states_ND(outputs, part.batch), self.temperature)


def _states_ND(outputs: Outputs, batch: Rollout) -> Tensor:
    assert outputs.states_BTD is not None
    return outputs.states_BTD[places(batch.completion_lengths, outputs.states_BTD.device)]


def _fitting(kl: float, limit: float) -> float:
    """Return the factor for a step of this KL: slightly less than where a parabola through it reaches δ."""
    return max(SHORTEST, 0.95 * math.sqrt(limit / max(kl, 1e-12))) if math.isfinite(kl) else SHORTEST
