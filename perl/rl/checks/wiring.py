"""Checks that each role computes with its own parameters: these are perturbed in turn, and all roles are read.

Before the first update of a recipe with RL alone, all roles equal the base, so roles that are mixed up give equal
results. Under perturbation they do not.

Axis letters: N tokens, I inputs and O outputs of a layer.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from perl.adapters.kind import AdaptedLayer
from perl.rl.checks.findings import Finding, bugs, named
from perl.rl.checks.perturbation import perturbed
from perl.rl.checks.tracking import gap
from perl.rl.collector import Collector
from perl.rl.samplers.base import Samples
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.roles.shared_base import SharedBase

SIZE = 0.5
"""Size of the perturbation; see `perturbed`."""
LEAK = 0.02
"""Movement of a role that is allowed under another role's perturbation, as a share of that under its own."""
TOKENS = 4
"""Number of noise rows on which each layer is tested."""
DEVIATION = 0.05
"""Allowed relative deviation of an adapter's output from its definition, in addition to rounding."""


def base_unchanged(roles: Roles) -> Finding:
    """Check that the base's weights are the bytes that were loaded."""
    changed = roles.base_changed()
    cause = f"an adapter was merged into the base, or the base was trained: {named(changed)}"
    return bugs("base unchanged", "tensors of the base that differ from those loaded", len(changed), cause)


def dropout_off(collector: Collector, samples: Samples, noise: float) -> Finding:
    """Check that two equal passes give the same result, with the policy perturbed so that its adapter matters.

    Args:
        noise: effect of rounding on a pass, nats per token.
    """
    with perturbed(collector.roles.parameters_of(Role.POLICY), SIZE):
        first_BT, second_BT = (collector.log_probs(Role.POLICY, samples) for _ in range(2))
    cause = "dropout is on: a module was left in training mode. This is a bug."
    words = "two equal passes of the policy, mean difference per token"
    return Finding("dropout off", words, gap(first_BT, second_BT, samples), max(1e-4, 2 * noise), cause)


def roles_apart(collector: Collector, samples: Samples) -> Finding:
    """Check that each role computes with its own weights and head and with no other role's."""
    roles = collector.roles
    head = roles.parameters_of(Role.CRITIC) if Role.CRITIC in roles.heads else []
    with perturbed(head, SIZE):  # a new head gives 0 for every input
        before = _outputs(collector, samples)
        noise = _moved(before, _outputs(collector, samples))
        tried: list[tuple[Role, str, dict[Role, float]]] = []
        for role, part, parameters in _parts(roles, list(before)):
            with perturbed(parameters, SIZE):
                tried.append((role, part, _moved(before, _outputs(collector, samples))))
    own: dict[Role, float] = {}
    for role, _, moved in tried:
        own[role] = max(own.get(role, 0.0), moved[role])
    wrong = []
    for role, part, moved in tried:
        if moved[role] <= 10 * noise[role]:
            lost = "its head is lost" if part == "head" else "it computes as another role, or as the base"
            wrong.append(f"the {role} does not depend on its own {part}: {lost}")
        for other, by in moved.items():
            shared = role is Role.POLICY and other is Role.CRITIC and not roles.weights(other)
            if other is not role and not shared and by > max(10 * noise[other], LEAK * own.get(other, own[role])):
                wrong.append(f"the {other} computes with the {part} of the {role}: a wrong role")
    words = "roles that do not compute with their own weights and head, or that compute with another role's"
    return bugs("roles apart", words, len(wrong), "; ".join(wrong))


def _parts(roles: Roles, tried: list[Role]) -> Iterator[tuple[Role, str, list[nn.Parameter]]]:
    for role in tried:
        if weights := list(roles.weights(role).values()):
            yield role, "weights", weights
        if role in roles.heads:
            yield role, "head", list(roles.head_weights(role).values())


def _outputs(collector: Collector, samples: Samples) -> dict[Role, Tensor]:
    """Return each role's outputs for the same completions: log-probs, rewards before scaling, values."""
    roles = collector.roles
    outputs = {role: collector.log_probs(role, samples) for role in (Role.POLICY, roles.reference)}
    for model in collector.reward.models:
        outputs |= dict(zip(model.members, model.scores(samples), strict=True))
    if Role.CRITIC in roles.heads:
        reader = Role.CRITIC if roles.weights(Role.CRITIC) else Role.POLICY
        _, values_BT = collector.read(reader, samples, None, Role.CRITIC)
        assert values_BT is not None
        outputs[Role.CRITIC] = values_BT
    return outputs


def _moved(before: dict[Role, Tensor], after: dict[Role, Tensor]) -> dict[Role, float]:
    return {role: float((after[role] - output).abs().mean()) for role, output in before.items()}


# The adapter of each layer.


class _Tried(NamedTuple):
    """Result of testing one layer's adapter on noise."""

    layer: str
    ratio: float
    """Size of the adapter's output, as a multiple of what it should be."""
    deviation: float
    """Mean absolute difference from the expected output, relative to it."""
    rest: float
    """The part of the deviation that a wrong scale does not explain."""
    tolerance: float
    """Allowed deviation, including rounding of the layer's output."""


def adapters_as_configured(roles: Roles) -> Iterator[Finding]:
    """Check that each layer adds what the current policy's adapter is defined to add, in training and sampling."""
    if not isinstance(roles, SharedBase) or roles.engine.shards_base or roles.engine.hooks_layers:
        return
    for name, context in (("forward pass", roles.role(Role.POLICY)), ("sampler", roles.sampling(Role.POLICY))):
        with perturbed(roles.parameters_of(Role.POLICY), SIZE):
            tried, active = _try_layers(roles, context, learning=name == "forward pass")
            wrong = _wrong(tried)
            again = _try_layers(roles, roles.sampling(Role.POLICY), learning=False)[0] if wrong else []
        late = bool(again) and name == "sampler" and not _wrong(again)
        cause = f"{_why(name, wrong, active, late)} (in {named([one.layer for one in wrong])})"
        words = f"layers in which the {name} does not add what the policy's adapter is defined to add"
        yield bugs(f"adapter in the {name}", words, len(wrong), cause)


def _wrong(tried: list[_Tried]) -> list[_Tried]:
    return [one for one in tried if not one.deviation <= one.tolerance]  # NaN is wrong too


def _why(name: str, wrong: list[_Tried], active: set[str], late: bool) -> str:
    """Return the most likely cause of adapters that do not act as they should."""
    if not wrong:
        return ""
    if active != {str(Role.POLICY)}:
        return f"the {name} computes as a wrong role: {', '.join(sorted(active)) or Role.BASE} instead of policy"
    if late:
        return "the sampler's weights are swapped one step late: it computes with the weights of its previous call"
    worst = max(wrong, key=lambda one: one.deviation)
    if abs(worst.ratio) < 0.1 + worst.tolerance:
        return f"the {name} is stale: it does not use the policy's current weights"
    scale_only = worst.rest <= worst.tolerance
    fault = "the scale is wrong" if scale_only else "the rank is truncated, or these are other factors"
    return f"{fault}: the {name} adds {worst.ratio:.2g} times what it should"


@torch.no_grad()
def _try_layers(
    roles: SharedBase, context: AbstractContextManager[Any], learning: bool
) -> tuple[list[_Tried], set[str]]:
    """Test each layer whose adapter can be tested alone; return the results and the active adapters' names."""
    with context:
        layers = list(roles.adapter.layers(Role.POLICY))
        active = set[str]().union(*(layer.active for layer in layers))
        return [_try_layer(roles, layer, learning) for layer in layers], active


def _try_layer(roles: SharedBase, adapted: AdaptedLayer, learning: bool) -> _Tried:
    generator = torch.Generator(roles.device).manual_seed(0)
    x_NI = torch.randn(TOKENS, adapted.inputs, generator=generator, device=roles.device).to(roles.lm.dtype)
    with torch.set_grad_enabled(learning):
        y_NO = adapted.layer(x_NI[None])[0].detach().float()
    plain_NO = adapted.base(x_NI[None])[0].detach().float()
    expected_NO = adapted.added(x_NI.float())
    added_NO = y_NO - plain_NO
    size = float(expected_NO.abs().mean())
    rounding = 2 * torch.finfo(roles.lm.dtype).eps * float(y_NO.abs().mean() + plain_NO.abs().mean()) / size
    ratio = float((added_NO * expected_NO).sum() / expected_NO.square().sum())
    deviation = float((added_NO - expected_NO).abs().mean()) / size
    rest = float((added_NO - ratio * expected_NO).abs().mean()) / size
    return _Tried(adapted.name, ratio, deviation, rest, DEVIATION + rounding)
