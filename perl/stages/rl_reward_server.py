"""Checks that reward servers give the scores of this run's reward model, before RL starts and when it resumes.

Axis letter: N rows.
"""

import torch
from torch import Tensor

from perl.backbones.padding import left_pad
from perl.recipe.reward_parts import ServerPart
from perl.rl.rewards.server import SECTION, ServedModel
from perl.rl.samplers.server.client import Server, ServerError
from perl.roles.role import Role
from perl.stages.reward_rows import held_out_rows
from perl.stages.rl_rewards import reward_context, settings_of
from perl.stages.session import Session
from perl.system.progress import console

ROWS = 8
"""Maximum number of held-out rows that are scored."""
SIGMOID = "it sends the sigmoid of the score: it does not know use_activation. Use vLLM 0.32 or newer."
BASE = "it serves the base without the adapter. Start it with --enable-lora and --lora-modules (docs/serving.md)."
ALIKE = "all its scores are equal: it sends the softmax of one number, or its head is empty."
SCALED = "another dtype, LoRA scale or rank. Start it as docs/serving.md says, or raise rl.reward.mismatch_limit."
OTHER = "a different adapter or head, or an older export: export the reward model again, and load that."


def check_reward_servers(session: Session) -> None:
    """Check each server's tokens and its scores of a few held-out rows against this run's reward model.

    If this run did not train the reward model, scores cannot be compared; a message says so.

    Raises:
        ServerError: a server's tokens or scores differ; says the most likely cause.
    """
    settings, context = settings_of(session), reward_context(session)
    for part in (*settings.reward_parts, *settings.eval_reward_parts):
        if not isinstance(part, ServerPart):
            continue
        source = part.source(context)
        assert isinstance(source, ServedModel)
        for server in source.servers:
            source.require(server)
            _check_tokens(session, source, server)
            if session.recipe.reward is None:
                console.print(
                    f"The scores of {server.url} cannot be checked: this run has no reward model to compare "
                    "them with.",
                    style="yellow",
                    markup=False,
                )
            else:
                _compare(session, source, server)


def _check_tokens(session: Session, source: ServedModel, server: Server) -> None:
    text = "\n".join(turn.text for turn in session.train.prompts[0].context)
    ours = session.base.tokenizer(text, add_special_tokens=False)["input_ids"]
    theirs = source.tokens(server, text)
    if theirs is not None and theirs != ours:
        raise ServerError(
            f"the server tokenizes a prompt differently: {len(ours)} tokens here, {len(theirs)} there",
            where=f"{SECTION}.url: {server.url}",
            remedy="Its base must have the same tokenizer as this base.",
        )


def _compare(session: Session, source: ServedModel, server: Server) -> None:
    rows, found = held_out_rows(session).ids, session.roles.roles
    rows = rows[:: -(-len(rows) // ROWS)]
    session.load(Role.REWARD)
    ours_N = _scores(session, Role.REWARD, rows)
    theirs_N = torch.tensor(source.scores(server, rows), dtype=torch.float64)
    difference = _largest_difference(ours_N, theirs_N)
    words = f"scores of {len(rows)} held-out rows from {server.url} and from this process, largest difference"
    if not difference <= source.limit:
        candidates = {SIGMOID: ours_N.sigmoid()}
        if Role.BASE in session.roles.roles:
            candidates[BASE] = _scores(session, Role.BASE, rows)
        raise ServerError(
            f"{words}: {difference:.2g} (at most {source.limit:.2g})",
            where=f"{SECTION}.url",
            remedy=f"Likely cause: {_cause(ours_N, theirs_N, candidates)}",
        )
    session.roles.keep(*found)
    console.print(f"[green]✓[/] {words}: {difference:.2g} (at most {source.limit:.2g})", highlight=False)


def _cause(ours_N: Tensor, theirs_N: Tensor, candidates: dict[str, Tensor]) -> str:
    nearest = min(candidates, key=lambda words: _largest_difference(candidates[words], theirs_N))
    if _largest_difference(candidates[nearest], theirs_N) < _largest_difference(ours_N, theirs_N) / 10:
        return nearest
    if float(theirs_N.std(correction=0)) < 1e-6:
        return ALIKE
    return SCALED if float(torch.corrcoef(torch.stack([ours_N, theirs_N]))[0, 1]) > 0.99 else OTHER


def _largest_difference(one_N: Tensor, other_N: Tensor) -> float:
    return float((one_N - other_N).abs().max())


@torch.no_grad()
def _scores(session: Session, role: Role, rows: list[list[int]]) -> Tensor:
    """Return the scores (N, fp64) of the reward model's head on a role's hidden states."""
    roles = session.roles
    ids_NL, mask_NL = left_pad(rows, session.base.chat.pad_id, roles.device)
    scores_N: Tensor = roles(role, ids_NL, mask_NL, head=Role.REWARD).scores_B.double().cpu()
    return scores_N
