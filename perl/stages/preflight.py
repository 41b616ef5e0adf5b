"""Preflight: before the first update, do the parts fit together? Each check is a figure, and what it should be.

What goes wrong between the stages goes wrong in silence: RL then trains for hours on noise. A few answers show it.

Axis letters: B answers, T answer positions.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perl.errors import UserError
from perl.model.roles import Role, Roles
from perl.model.saved import load_role
from perl.progress import console
from perl.results import Check, Recorded
from perl.rl.arithmetic import kl_k3, masked_mean
from perl.rl.rewards import RewardModel, RewardSource, score_rows, with_written_end
from perl.rl.rollout import EncodedPrompts, answer, read_answers
from perl.rl.sampler import Samples, Sampling
from perl.stages.reward import held_out_rows, recorded_scores
from perl.stages.session import Session

ANSWERS = 8
"""Answers that are looked at."""
CLOSE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
"""How far scores and log-probs may lie apart that are the same by arithmetic, by the base's dtype."""
KL_LIMIT = 1e-3
"""Nats an answer; policy and reference are the same numbers then."""


class PreflightError(UserError):
    """The recipe is right, but what it put together does not fit."""

    status = 1


@dataclass(frozen=True)
class Finding(Check):
    """One check, and why it failed."""

    looks_like: str = ""
    """Where it failed: the likeliest of the usual causes, by the evidence."""

    @property
    def passed(self) -> bool:
        """Whether the figure is a number within its limit."""
        return self.figure <= self.limit


def preflight(session: Session, reward: RewardSource, sampling: Sampling, prompts: EncodedPrompts) -> list[Check]:
    """Check before the first update, a line each on the console; return what was found.

    Raises:
        PreflightError: a check failed; it names the cause that it looks like.
    """
    settings = session.recipe.rl
    assert settings is not None
    session.roles.eval()
    prompts = prompts.take(range(min(ANSWERS, len(prompts), settings.prompts_per_step)))
    generator = torch.Generator(session.device).manual_seed(session.recipe.seed)
    samples, _ = answer(session.roles, Role.POLICY, session.base.chat, prompts, sampling, generator)
    findings = []
    for finding in _checks(session, reward, sampling, prompts, samples):
        mark = "[green]✓[/]" if finding.passed else "[red]✗[/]"
        console.print(f"{mark} Preflight: {finding.words}: {finding.figure:.2g} (at most {finding.limit:g})")
        findings.append(finding)
    failed = [finding for finding in findings if not finding.passed]
    if failed:
        first = failed[0]
        others = f" Also failed: {', '.join(finding.name for finding in failed[1:])}." if failed[1:] else ""
        raise PreflightError(
            f"preflight failed before the first update: {first.words} is {first.figure:.3g}, at most "
            f"{first.limit:g}.{others}",
            where=str(session.folder.path),
            remedy=f"It looks like this: {first.looks_like}",
        )
    return [Check(one.name, one.words, one.figure, one.limit) for one in findings]


def _checks(
    session: Session, reward: RewardSource, sampling: Sampling, prompts: EncodedPrompts, samples: Samples
) -> Iterator[Finding]:
    """The checks that this recipe allows; what later ones rest on comes first."""
    for role in (Role.SFT, Role.REWARD):
        if role in session.roles.roles:
            yield reloaded(session, role, samples)
    if isinstance(reward, RewardModel):
        trained = session.folder.results().reward
        if trained is not None and trained.recorded:
            yield recorded_evaluation(session, trained.recorded)
    yield read_at_the_end(session, reward, sampling, prompts, samples)
    yield sampled_as_read(session, samples)
    yield begins_as_the_reference(session, samples)


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


def recorded_evaluation(session: Session, recorded: Sequence[Recorded]) -> Finding:
    """The reward adapter gives a few held-out rows the scores that its own stage wrote down."""
    rows = held_out_rows(session)
    pad_id, expected = session.base.chat.pad_id, torch.tensor([row.score for row in recorded])
    chosen = [row.row for row in recorded]
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
    return Finding("recorded evaluation", words, _largest(found - expected), _close(session), cause)


def read_at_the_end(
    session: Session, reward: RewardSource, sampling: Sampling, prompts: EncodedPrompts, samples: Samples
) -> Finding:
    """The reward is read at each answer's last token, of the kind that it was trained to be read at.

    Where an answer ended with another of the end tokens, that one stands there instead (`with_written_end`).
    """
    roles, chat = session.roles, session.base.chat
    ends = [chat.ends(prompt.context) for prompt in prompts.prompts]
    answers = samples.answers()
    wrong_end = any(sampling.end_ids != wanted for wanted in ends) or any(
        ended and tokens[-1] not in wanted
        for tokens, wanted, ended in zip(answers, ends, samples.ended_B.tolist(), strict=True)
    )
    elsewhere = 0
    if isinstance(reward, RewardModel):
        read = with_written_end(samples, ends[0]).answers()
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


def sampled_as_read(session: Session, samples: Samples) -> Finding:
    """The log-probs that the sampler drew with are those of a forward pass over the answers."""
    settings = session.recipe.rl
    assert settings is not None

    def gap(log_probs_BT: Tensor) -> float:
        return float(masked_mean((log_probs_BT - samples.log_probs_BT).abs(), samples.answer_mask_BT))

    def read(temperature: float, at_once: int) -> float:
        return gap(_log_probs(session, Role.POLICY, samples, temperature, at_once))

    figure = read(settings.temperature, settings.micro_batch_size)
    cause = ""
    if not figure <= _close(session):
        others = [settings.temperature * 2 ** (power / 4) for power in range(-8, 9) if power]
        gaps = {other: read(other, settings.micro_batch_size) for other in others}
        nearest = min(gaps, key=gaps.__getitem__)
        if gaps[nearest] < 0.5 * figure:
            cause = (
                f"the sampler draws at another temperature, or its logits are scaled: they agree best at about "
                f"{nearest:.2g}, rl.temperature is {settings.temperature:g}."
            )
        elif gap(_alone(session, samples, settings.temperature)) < 0.5 * figure:
            cause = "rows read alone agree, rows read together do not: padding on the wrong side, or positions."
        else:
            cause = "the sampler computes as another role, or its cache or positions are off. This is a bug."
    words = "the sampler's log-probs against a forward pass over its answers, mean difference a token"
    return Finding("sampled as read", words, figure, _close(session), cause)


def begins_as_the_reference(session: Session, samples: Samples) -> Finding:
    """KL to the reference, k3 estimate (never negative, and 0 only of equals), in nats an answer."""
    settings, roles = session.recipe.rl, session.roles
    assert settings is not None
    policy_BT, reference_BT = (
        _log_probs(session, role, samples, settings.temperature, settings.micro_batch_size)
        for role in (Role.POLICY, roles.reference)
    )
    kl_BT = kl_k3(policy_BT, reference_BT).masked_fill(~samples.answer_mask_BT, 0.0)
    ours, theirs = roles.weights(Role.POLICY), roles.weights(roles.reference)
    if theirs and all(torch.equal(ours[name], theirs[name]) for name in ours):
        cause = "the weights are equal, so they are computed differently: dropout is on, or the padding differs."
    else:
        cause = f"the policy did not begin as a copy of {roles.reference}; its adapter is another's."
    words = f"KL of the policy to its reference ({roles.reference}), nats an answer"
    return Finding("begins as the reference", words, float(kl_BT.sum(1).mean()), KL_LIMIT, cause)


def _scores(session: Session, role: Role, samples: Samples) -> Tensor:
    """What a role says of the answers: scores if it has a head, else log-probs."""
    if role in session.roles.heads:
        rows = [[*prompt, *tokens] for prompt, tokens in zip(_prompts(samples), samples.answers(), strict=True)]
        return torch.tensor(score_rows(session.roles, rows, session.base.chat.pad_id, 1))
    assert session.recipe.rl is not None
    return _log_probs(session, role, samples, 1.0, session.recipe.rl.micro_batch_size)


def _log_probs(session: Session, role: Role, samples: Samples, temperature: float, at_once: int) -> Tensor:
    log_probs_BT, _ = read_answers(session.roles, role, samples, at_once, temperature=temperature, head=None)
    assert log_probs_BT is not None
    return log_probs_BT


@torch.no_grad()
def _alone(session: Session, samples: Samples, temperature: float) -> Tensor:
    """The policy's log-probs (B, T), a row at a time and without padding."""
    log_probs_BT = torch.zeros_like(samples.log_probs_BT)
    for row, (prompt, tokens) in enumerate(zip(_prompts(samples), samples.answers(), strict=True)):
        ids_BL = torch.tensor([[*prompt, *tokens]], device=session.device)
        outputs = session.roles(
            Role.POLICY, ids_BL, torch.ones_like(ids_BL).bool(), answer_length=len(tokens), temperature=temperature
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
    width = samples.ids_BL.shape[1] - samples.answer_length
    rows = samples.ids_BL[:, :width].tolist()
    return [row[width - length :] for row, length in zip(rows, samples.prompt_lengths, strict=True)]


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def _close(session: Session) -> float:
    return CLOSE[session.recipe.base.dtype]
