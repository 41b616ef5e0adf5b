"""Preflight checks of the earlier stages' results: the roles on disk, the reward model's scores, the data."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from perl.backbones.tokens import Tokens
from perl.results import Recorded
from perl.rl.checks.findings import Finding
from perl.rl.checks.preflight import CLOSE, EarlierStages
from perl.rl.collector import read_completions
from perl.rl.rewards.combination import CombinedReward
from perl.rl.rewards.model import score_rows
from perl.rl.samplers.base import Samples
from perl.roles.role import REWARD_MEMBERS, Role
from perl.roles.saved import load_role
from perl.stages.reward import checksum, recorded_scores
from perl.stages.reward_rows import held_out_rows
from perl.stages.reward_scores import run_scores
from perl.stages.session import Session


def earlier_stages(session: Session, reward: CombinedReward) -> EarlierStages:
    """Return the checks of a run with this reward."""

    def check(samples: Samples, again: bool) -> Iterator[Finding]:
        for role in () if again else (Role.SFT, *REWARD_MEMBERS):
            if role in session.roles.roles:
                yield reloaded(session, role, samples)
        if reward.models:
            trained = session.folder.results().reward
            if trained is not None and trained.recorded:
                yield from recorded_evaluation(session, trained.recorded)

    return check


def reloaded(session: Session, role: Role, samples: Samples) -> Finding:
    """Check that the role, reloaded from its folder, computes the same outputs as it did in memory."""
    roles = session.roles
    before = _outputs(session, role, samples)
    head = roles.head(role).weight.clone() if role in roles.heads else None
    load_role(roles, role, session.saved(role), session.base)
    figure = _largest(_outputs(session, role, samples) - before)
    if head is not None and not torch.equal(head, roles.head(role).weight):
        cause = "the head was lost on saving, or the folder has another role's. Train the stage again."
    else:
        cause = "another adapter was written to this folder, or this one only in part. Train the stage again."
    words = f"the {role} adapter read from disk and the one in memory, largest difference"
    return Finding(f"{role} reloaded", words, figure, _limit(session), cause)


def recorded_evaluation(session: Session, recorded: Sequence[Recorded]) -> Iterator[Finding]:
    """Check that a few held-out rows have the tokens and scores that the reward stage recorded."""
    rows, limit = held_out_rows(session), _limit(session)
    chosen, expected = [row.row for row in recorded], torch.tensor([row.score for row in recorded])
    now = {row: checksum(rows.tokens[row].ids) for row in chosen if row < len(rows.tokens)}
    differ = sum(now.get(row.row) != row.tokens for row in recorded)
    cause = "the chat template, the tokenizer or the data have changed since the reward stage. Train it again."
    words = "held-out rows whose tokens differ from those in the reward stage"
    yield Finding("tokens as recorded", words, differ, 0.0, cause)
    if max(chosen) >= len(rows.tokens):
        scores = torch.full_like(expected, math.nan)
        cause = "the held-out rows are not the same: the data have changed. Restore them."
    else:
        scores = torch.tensor([row.score for row in recorded_scores(session, rows, chosen)])
        alone = [float(run_scores(session, [rows.tokens[index]])[0]) for index in chosen]
        if float(scores.std(unbiased=False)) < 1e-6:
            cause = "all scores are equal: the head was lost on saving. Train the reward stage again."
        elif _largest(torch.tensor(alone) - expected) <= limit:
            cause = "single rows have the recorded scores, batches do not: padding on the wrong side."
        else:
            cause = (
                "an adapter of another base or another run, another chat template, or data that have changed "
                "since. Train the reward stage again."
            )
    words = f"the rewards of {len(chosen)} held-out rows and their recorded values, largest difference"
    yield Finding("recorded evaluation", words, _largest(scores - expected), limit, cause)


def _outputs(session: Session, role: Role, samples: Samples) -> Tensor:
    """Return the role's scores of the completions if it has a head, else its log-probs."""
    roles = session.roles
    if role in roles.heads:
        both = zip(samples.prompt_ids(), samples.completions(), strict=True)
        rows = [Tokens.joined(prompt, tokens) for prompt, tokens in both]
        return score_rows(roles, [role], rows, session.base.chat.pad_id, 1)[0]
    log_probs_BT, _ = read_completions(roles, role, samples, len(samples.ids_BL), temperature=1.0, head=None)
    assert log_probs_BT is not None
    return log_probs_BT


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def _limit(session: Session) -> float:
    return CLOSE[getattr(torch, session.recipe.base.dtype)]
