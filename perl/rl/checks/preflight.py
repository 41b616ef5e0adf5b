"""Preflight: before the first update, do the parts fit together? Each check is a figure, and what it should be.

What goes wrong between the stages goes wrong in silence: RL then trains for hours on noise. A few answers show it.

Axis letters: B answers, T answer positions.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from perl.results import Check, Recorded
from perl.rl.checks.findings import CLOSE_LOG_PROBS, Finding, require
from perl.rl.checks.tracking import (
    against_the_reference,
    at_the_temperature,
    fitted_temperature,
    follows_the_policy,
    gap,
    log_probs,
    moves_alike,
    rounding_noise,
)
from perl.rl.checks.wiring import adapters_as_configured, base_unchanged, dropout_off, roles_apart
from perl.rl.maths import kl_k3
from perl.rl.rewards.sources import RewardModel, RewardSource, score_rows, with_written_end
from perl.rl.rollout import EncodedPrompts, answer
from perl.rl.samplers.local import Samples, Sampling
from perl.roles.roles import Role, Roles
from perl.roles.saved import load_role
from perl.stages.reward import checksum, recorded_scores
from perl.stages.reward_rows import held_out_rows
from perl.stages.session import Session

ANSWERS = 8
"""Answers that are looked at."""
CLOSE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
"""How far scores may lie apart that are the same by arithmetic, by the base's dtype."""
KL_LIMIT = 1e-3
"""Nats an answer; policy and reference are the same numbers then."""


def preflight(
    session: Session, reward: RewardSource, sampling: Sampling, prompts: EncodedPrompts, again: bool = False
) -> list[Check]:
    """Check before the first update, a line each on the console; return what was found.

    Args:
        again: after the first update, when the roles differ: what can only be so before it is left out, and only
            what fails is printed.

    Raises:
        PreflightError: a check failed; it names the cause that it looks like.
    """
    settings = session.recipe.rl
    assert settings is not None
    session.roles.eval()
    prompts = prompts.take(range(min(ANSWERS, len(prompts), settings.prompts_per_step)))
    generator = torch.Generator(session.device).manual_seed(session.recipe.seed)
    samples, _ = answer(session.roles, Role.POLICY, session.base.chat, prompts, sampling, generator)
    checks = _checks(session, reward, sampling, prompts, samples, again)
    when = "after the first update" if again else "before the first update"
    return require(checks, when, str(session.folder.path), quiet=again)


def _checks(
    session: Session,
    reward: RewardSource,
    sampling: Sampling,
    prompts: EncodedPrompts,
    samples: Samples,
    again: bool,
) -> Iterator[Finding]:
    """The checks that this recipe allows; what later ones rest on comes first."""
    base = base_unchanged(session)
    yield base
    for role in () if again else (Role.SFT, Role.REWARD):
        if role in session.roles.roles:
            yield reloaded(session, role, samples)
    if isinstance(reward, RewardModel):
        trained = session.folder.results().reward
        if trained is not None and trained.recorded:
            yield from recorded_evaluation(session, trained.recorded)
    yield read_at_the_end(session, reward, sampling, prompts, samples)
    noise = rounding_noise(session, samples)
    yield sampled_as_read(session, samples, noise)
    yield at_the_temperature(session, samples)
    if not again:
        yield begins_as_the_reference(session, samples)
    under_perturbation = [
        dropout_off(session, samples, noise),
        *adapters_as_configured(session),
        roles_apart(session, reward, samples),
        *follows_the_policy(session, sampling, prompts, noise),
    ]
    after = base_unchanged(session)
    if base.passed and not after.passed:  # by what was sampled just now: the cause of all else
        yield after
    yield from under_perturbation
    if again:
        words = "what the sampler's log-probs miss of the policy's first movement, as a share"
        policy = against_the_reference(session, samples)
        yield from moves_alike("sampler moved as the policy", words, policy, noise)


def reloaded(session: Session, role: Role, samples: Samples) -> Finding:
    """The role read anew from its folder scores the answers as it did in memory."""
    roles = session.roles
    before = _scores(session, role, samples)
    head = roles.head(role).weight.clone() if role in roles.heads else None
    load_role(roles, role, session.saved(role), session.base)
    figure = _largest(_scores(session, role, samples) - before)
    if head is not None and not torch.equal(head, roles.head(role).weight):
        cause = "the head was lost on saving, or the folder holds another one's. Train the stage again."
    else:
        cause = "another adapter was written into this folder, or this one only in part. Train the stage again."
    words = f"the {role} adapter read from disk against the one in memory, largest difference"
    return Finding(f"{role} reloaded", words, figure, _close(session), cause)


def recorded_evaluation(session: Session, recorded: Sequence[Recorded]) -> Iterator[Finding]:
    """A few held-out rows have the tokens, and the reward adapter's scores, that its own stage wrote down."""
    rows = held_out_rows(session)
    pad_id, expected = session.base.chat.pad_id, torch.tensor([row.score for row in recorded])
    chosen = [row.row for row in recorded]
    now = {row: checksum(rows.ids[row]) for row in chosen if row < len(rows.ids)}
    differ = sum(now.get(row.row) != row.tokens for row in recorded)
    cause = "the chat template, the tokenizer or the data have changed since the reward stage. Train it again."
    yield Finding(
        "tokens as recorded", "held-out rows whose tokens are not as in the reward stage", differ, 0.0, cause
    )
    if max(chosen) >= len(rows.ids):
        found = torch.full_like(expected, math.nan)
        cause = "the held-out rows are others than they were: the data have changed. Put them back."
    else:
        found = torch.tensor([row.score for row in recorded_scores(session.roles, rows, pad_id, chosen)])
        alone = [score_rows(session.roles, [rows.ids[index]], pad_id, 1)[0] for index in chosen]
        if float(found.std(unbiased=False)) < 1e-6:
            cause = "all scores are alike: the head was lost on saving. Train the reward stage again."
        elif _largest(torch.tensor(alone) - expected) <= _close(session):
            cause = "rows read alone score as recorded, rows read together do not: padding on the wrong side."
        else:
            cause = (
                "an adapter of another base or another run, another chat template, or data that have changed "
                "since. Train the reward stage again."
            )
    words = f"the reward of {len(chosen)} held-out rows against its recorded evaluation, largest difference"
    yield Finding("recorded evaluation", words, _largest(found - expected), _close(session), cause)


def read_at_the_end(
    session: Session, reward: RewardSource, sampling: Sampling, prompts: EncodedPrompts, samples: Samples
) -> Finding:
    """The reward is read at each answer's last token, of the kind that it was trained to be read at.

    Where an answer ended with another of the end tokens, that one stands there instead (`with_written_end`).
    """
    roles, chat = session.roles, session.base.chat
    ends = [chat.ends(prompt.context) for prompt in prompts.prompts]
    answers = samples.completions()
    wrong_end = any(sampling.end_ids != wanted for wanted in ends) or any(
        ended and tokens[-1] not in wanted
        for tokens, wanted, ended in zip(answers, ends, samples.ended_B.tolist(), strict=True)
    )
    elsewhere = 0
    if isinstance(reward, RewardModel):
        read = with_written_end(samples, ends[0]).completions()
        rows = [[*prompt, *tokens] for prompt, tokens in zip(prompts.ids, read, strict=True)]
        at_the_end = [_read_at_last_token(roles, row) for row in rows]
        found = reward.scores(samples)
        elsewhere = sum(
            not abs(one - other) <= _close(session) for one, other in zip(found, at_the_end, strict=True)
        )
    if wrong_end:
        here, there = (
            " or ".join(map(repr, chat.tokenizer.convert_ids_to_tokens(list(some))))
            for some in (sampling.end_ids, ends[0])
        )
        cause = (
            f"a wrong chat template or end-of-turn token: answers here end with {here or 'nothing'}, the reward "
            f"was trained on answers that end with {there}."
        )
    else:
        cause = "padding on the wrong side: the score is read at a padding token, or at a token before the end."
    words = f"of {len(answers)} answers, those whose reward is not read at their last token"
    return Finding("read at the end", words, len(answers) if wrong_end else elsewhere, 0.0, cause)


def sampled_as_read(session: Session, samples: Samples, noise: float) -> Finding:
    """The log-probs that the sampler drew with are those of a forward pass over the completions.

    Args:
        noise: nats a token that rounding makes of a pass.
    """

    def read(log_probs_BT: Tensor) -> float:
        return gap(log_probs_BT, samples.log_probs_BT, samples)

    figure = read(log_probs(session, Role.POLICY, samples))
    limit = max(CLOSE_LOG_PROBS[session.recipe.base.dtype], 2 * noise)
    cause = "" if figure <= limit else _why_not_as_read(session, read, samples, figure)
    words = "the sampler's log-probs against a forward pass over its answers, mean difference a token"
    return Finding("sampled as read", words, figure, limit, cause)


def _why_not_as_read(session: Session, read: Callable[[Tensor], float], samples: Samples, figure: float) -> str:
    """What brings the forward pass closer to the sampler."""
    assert session.recipe.rl is not None
    temperature = session.recipe.rl.temperature
    others = [temperature * 2 ** (power / 4) for power in range(-8, 9) if power]
    off, _ = fitted_temperature(session, samples)
    others.append(temperature * math.exp(max(-2.0, min(off, 2.0))))
    gaps = {other: read(log_probs(session, Role.POLICY, samples, other)) for other in others}
    nearest = min(gaps, key=gaps.__getitem__)
    if gaps[nearest] < 0.5 * figure:
        return (
            f"the sampler draws at another temperature, or its logits are scaled: they agree best at about "
            f"{nearest:.3g}, rl.temperature is {temperature:g}."
        )
    if read(_alone(session, samples, temperature)) < 0.5 * figure:
        return "rows read alone agree, rows read together do not: padding on the wrong side, or positions."
    others_roles = session.roles.roles - {Role.POLICY, Role.CRITIC}
    for role in sorted(others_roles):
        if read(log_probs(session, role, samples)) < 0.5 * figure:
            return f"the sampler computes as a wrong role: {role} instead of {Role.POLICY}. This is a bug."
    return "the sampler computes as another role, or its cache or positions are off. This is a bug."


def begins_as_the_reference(session: Session, samples: Samples) -> Finding:
    """KL to the reference, k3 estimate (never negative, and 0 only of equals), in nats an answer."""
    roles = session.roles
    policy_BT, reference_BT = (log_probs(session, role, samples) for role in (Role.POLICY, roles.reference))
    kl_BT = kl_k3(policy_BT, reference_BT).masked_fill(~samples.completion_mask_BT, 0.0)
    ours, theirs = roles.weights(Role.POLICY), roles.weights(roles.reference)
    if theirs and all(torch.equal(ours[name], theirs[name]) for name in ours):
        cause = "the weights are equal, so they are computed differently: dropout is on, or the padding differs."
    else:
        cause = f"the policy did not begin as a copy of {roles.reference}; its adapter is another's."
    words = f"KL of the policy to its reference ({roles.reference}), nats a completion"
    return Finding("begins as the reference", words, float(kl_BT.sum(1).mean()), KL_LIMIT, cause)


def _scores(session: Session, role: Role, samples: Samples) -> Tensor:
    """What a role says of the answers: scores if it has a head, else log-probs."""
    if role in session.roles.heads:
        rows = [
            [*prompt, *tokens] for prompt, tokens in zip(_prompts(samples), samples.completions(), strict=True)
        ]
        return torch.tensor(score_rows(session.roles, rows, session.base.chat.pad_id, 1))
    return log_probs(session, role, samples, 1.0)


@torch.no_grad()
def _alone(session: Session, samples: Samples, temperature: float) -> Tensor:
    """The policy's log-probs (B, T), a row at a time and without padding."""
    log_probs_BT = torch.zeros_like(samples.log_probs_BT)
    for row, (prompt, tokens) in enumerate(zip(_prompts(samples), samples.completions(), strict=True)):
        ids_BL = torch.tensor([[*prompt, *tokens]], device=session.device)
        outputs = session.roles(
            Role.POLICY,
            ids_BL,
            torch.ones_like(ids_BL).bool(),
            completion_length=len(tokens),
            temperature=temperature,
        )
        log_probs_BT[row, : len(tokens)] = outputs.log_probs_BT[0]
    return log_probs_BT


@torch.no_grad()
def _read_at_last_token(roles: Roles, row: list[int]) -> float:
    """The reward head on the hidden state of a row's last token, the row alone and without padding."""
    ids_BL = torch.tensor([row], device=roles.device)
    with roles.role(Role.REWARD):
        hidden_BLD = roles.trunk(ids_BL, torch.ones_like(ids_BL).bool())
    return float(roles.head(Role.REWARD)(hidden_BLD[0, -1].float()))


def _prompts(samples: Samples) -> list[list[int]]:
    """The prompts' tokens without their padding."""
    width = samples.ids_BL.shape[1] - samples.completion_length
    rows = samples.ids_BL[:, :width].tolist()
    return [row[width - length :] for row, length in zip(rows, samples.prompt_lengths, strict=True)]


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def _close(session: Session) -> float:
    return CLOSE[session.recipe.base.dtype]
