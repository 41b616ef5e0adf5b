"""Checks that training has an effect: what the optimizer holds, and what the first updates changed.

A run whose updates change nothing looks like one that learns slowly: it ends with status 0 and a policy equal to
its reference. The first updates of each process are therefore checked, tensor by tensor.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from perl.adapters.kind import AdapterKind
from perl.results import Check
from perl.rl.checks.findings import Finding, bugs, named, require
from perl.rl.checks.guarding import Mode
from perl.rl.checks.movement import at_the_end, policy_movement
from perl.rl.checks.preflight import Preflight
from perl.rl.checks.tracking import against_the_reference, moves_alike
from perl.rl.rollout import Rollout
from perl.rl.update import Learner
from perl.roles.fingerprint import Fingerprint, changed, fingerprint
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.roles.shared_base import SharedBase
from perl.runs import snapshot

CHECKED_UPDATES = 2
"""A critic's adapter first changes in the second update, because its head starts at zero."""
SHOWN_SHARE = 0.01
"""Share of the full learning rate below which weights are not required to change visibly."""
LOOK_AGAIN = 5
"""The policy's movement is measured after the first update, and again after a fifth of the steps,"""
FEWEST_STEPS = 10
"""but not before this step."""
ROWS = 8
"""Number of completions that are read."""


def optimizer_holds_what_learns(learner: Learner) -> Iterator[Finding]:
    """Check that the optimizer holds exactly the trained roles' parameters, and that these require gradients.

    This also holds for an engine that works on flat copies: its groups hold the parameters that it copies to.
    """
    roles, optimizer = learner.roles, snapshot.unwrapped(learner.optimizer)
    wanted = snapshot.trained_state(roles, learner.trained)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held_ids, wanted_ids = {id(one) for one in held}, {id(one) for one in wanted.values()}
    known = {id(parameter): name for name, parameter in roles.named_parameters()}
    missing = [name for name, parameter in wanted.items() if id(parameter) not in held_ids]
    foreign = [known.get(one, "a tensor of no role, perhaps a copy") for one in held_ids - wanted_ids]
    frozen = [name for name, parameter in wanted.items() if not parameter.requires_grad]
    yield bugs(
        "optimizer holds what learns",
        "trainable parameters that are missing from the optimizer",
        len(missing),
        f"the optimizer was given {named(foreign) or 'nothing'} instead of {named(missing)}",
    )
    yield bugs(
        "optimizer holds nothing else",
        "tensors in the optimizer that should not be trained, or are in it twice",
        len(foreign) + len(held) - len(held_ids),
        f"the optimizer also trains {named(foreign) or 'a parameter twice'}",
    )
    cause = f"the adapter is not trained: {named(frozen)} does not require gradients"
    yield bugs("takes gradients", "trainable parameters that do not require gradients", len(frozen), cause)


class Liveness:
    """Checks of the first updates that this process makes.

    Args:
        mode: mode of the guards; with `off` the policy's movement is not measured.

    Raises:
        PreflightError: the optimizer does not hold the parameters to train.
    """

    def __init__(self, learner: Learner, preflight: Preflight, mode: Mode) -> None:
        self._learner, self._preflight, self._mode = learner, preflight, mode
        self.found: list[Check] | None = None
        """Findings of the checks after the first update, in this process or before the run was resumed."""
        self._updates = 0
        self._look_again = max(FEWEST_STEPS, len(learner.rate_shares) // LOOK_AGAIN)
        self._rows: Rollout | None = None
        """The first rows of the last rollout."""
        self._findings: list[Finding] = []
        """Findings of the last update."""
        self._require(optimizer_holds_what_learns(learner), "before the first update")

    def watch(self, step: int, rollout: Rollout, update: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Make an update from a rollout that has a signal, and record what it changes.

        Args:
            step: counted from 0.
            rollout: the rollout of all processes, so that all read the same completions.
            update: returns the step's metrics.

        Raises:
            PreflightError: the rollout was not sampled by the policy.
        """
        learner, roles = self._learner, self._learner.roles
        self._rows = rollout.take(range(min(ROWS, len(rollout.texts))))
        if self._updates >= CHECKED_UPDATES or learner.rate_shares[step] == 0:
            return update()
        if self._updates and not self._preflight.collector.sampler.lags:
            self._require(self._sampled_by_the_policy(self._rows), "before the second update")
        trained = snapshot.trained_state(roles, learner.trained)
        frozen = snapshot.trained_state(roles, [role for role in roles.roles if role not in learner.trained])
        before, frozen_before = fingerprint(trained), fingerprint(frozen)
        with _gradients(trained) as gradients, _dropout(roles) as dropout:
            metrics = update()
        if not metrics.get("refused") and metrics.get("step_share") != 0.0:
            self._updates += 1
            cause = f"dropout is on in the update: {named(sorted(dropout))}"
            touched = changed(frozen_before, frozen)
            # Near the end of its schedule a resumed run makes updates below the weights' precision.
            shows = learner.rate_shares[step] >= SHOWN_SHARE
            self._findings = [
                bugs("no dropout in the update", "dropout modules in training mode", len(dropout), cause),
                *(self._learned(before, gradients) if shows else ()),
                bugs(
                    "frozen roles unchanged",
                    "tensors of frozen roles that have changed",
                    len(touched),
                    f"a frozen role was trained or overwritten: {named(touched)}",
                ),
            ]
        return metrics

    def after_step(self, step: int) -> dict[str, float]:
        """Check the effects of the first updates; return the policy's movement at the steps where it is measured.

        Args:
            step: counted from 1.

        Raises:
            PreflightError: the update did not have the expected effect, or the sampler does not follow the policy.
        """
        first = False
        if self._findings:
            name = "first" if self._updates == 1 else "second"
            found = self._require(self._findings, f"after the {name} update")
            self._findings = []
            if self._updates == 1:
                found += self._preflight.check(again=True)
                first = self.found is None
                self.found = self.found or found
        if self._rows is None or self._mode == "off" or not (first or step == self._look_again):
            return {}
        moved = policy_movement(self._preflight.collector, self._rows)
        return {"movement": moved, "movement_at_the_end": at_the_end(moved, self._learner.rate_shares, step)}

    def _require(self, findings: Iterable[Finding], when: str) -> list[Check]:
        return require(findings, when, self._preflight.where, quiet=True)

    def _sampled_by_the_policy(self, rollout: Rollout) -> Iterator[Finding]:
        """Check that the rollout's own log-probs moved as the policy's did in the first update."""
        policy = against_the_reference(self._preflight.collector, rollout)
        words = "share of the policy's first movement that the rollout's log-probs miss"
        yield from moves_alike("rollout by the policy", words, policy, self._preflight.noise(rollout))

    def _learned(self, before: Fingerprint, gradients: dict[str, Tensor]) -> Iterator[Finding]:
        """Check that each trained role has changed: its weights in at least one module, and its head."""
        adams = "learning_rate", self._learner.rates[0]
        roles, trained = self._learner.roles, self._learner.trained
        # In a whole model every tensor counts as its own module.
        module_of = roles.adapter.module_of if isinstance(roles, SharedBase) else str
        unchanged = set(before) - set(changed(before, snapshot.trained_state(roles, trained)))
        for role in trained:
            weights = [f"{role}.{name}" for name in roles.weights(role)]
            heads = [name for name in before if name.startswith(f"{role}.") and name not in weights]
            if weights and (role is not Role.CRITIC or self._updates > 1):
                modules = {module_of(name) for name in weights}
                still = modules - {module_of(name) for name in weights if name not in unchanged}
                words = f"unchanged modules of the {role}"
                size = self._learner.step_size if role is Role.POLICY else adams
                cause = _why_unchanged(weights, gradients, *size)
                yield Finding(f"{role} learns", words, len(still), len(modules) - 1, cause)
            if heads:
                words = f"unchanged tensors of the {role}'s head"
                cause = _why_unchanged(heads, gradients, *adams)
                yield Finding(f"{role}'s head learns", words, len(unchanged & set(heads)), 0, cause)
        if isinstance(roles, SharedBase):
            now, start = roles.weights(Role.POLICY), roles.weights(roles.reference)
            still_ranks = unchanged_ranks(roles.adapter, now, start)
            cause = "the rank is truncated: part of the adapter's factors is never used"
            yield bugs("all ranks learn", "unchanged ranks of the policy's adapter", still_ranks, cause)


def unchanged_ranks(adapter: AdapterKind, now: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> int:
    """Count the ranks that are unchanged in all modules; a factor that `start` lacks was zero."""
    still_R = [
        (factor == start.get(name, 0)).all(1 - axis)
        for name, factor in now.items()
        if (axis := adapter.rank_axis(name, factor)) is not None
    ]
    return int(torch.stack(still_R).all(0).sum()) if still_R else 0


def _why_unchanged(names: Sequence[str], gradients: dict[str, Tensor], key: str, size: float) -> str:
    """Return why weights have not changed, where a key of section `rl` sets the size of their steps."""
    largest = max((float(gradients[name]) for name in names if name in gradients), default=None)
    if largest is None:
        return "the adapter or head is not trained: no gradient reached it. This is a bug."
    if largest == 0:
        return "the adapter or head is not trained: its gradient is zero everywhere. This is a bug."
    return (
        f"there is a gradient (largest element {largest:.1g}), but the update at {key.replace('_', ' ')} "
        f"{size:.1g} is lost: it is too small for the weights' precision (raise rl.{key}), or the optimizer "
        "works on copies."
    )


@contextlib.contextmanager
def _gradients(parameters: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Record the largest gradient of each parameter inside the block; parameters without one are left out."""
    largest: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for name, parameter in parameters.items():

            def note(accumulated: Tensor, name: str = name) -> None:
                assert accumulated.grad is not None
                largest[name] = accumulated.grad.detach().abs().max()

            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
                stack.enter_context(hook)
        yield largest


@contextlib.contextmanager
def _dropout(roles: Roles) -> Iterator[set[str]]:
    """Record the dropout modules that are active in passes with gradients inside the block."""
    modules = {name: module for name, module in roles.named_modules() if isinstance(module, nn.Dropout)}
    on: set[str] = set()

    def note(*_: object) -> None:
        if torch.is_grad_enabled():
            on.update(name for name, module in modules.items() if module.training and module.p > 0)

    with roles.register_forward_pre_hook(note):
        yield on
