"""`chat`: talk to base, SFT and RL policy side by side in the terminal."""

from pathlib import Path

import torch
from rich.columns import Columns
from rich.panel import Panel
from rich.prompt import Prompt as Ask

from perl.commands.evaluate import open_run
from perl.data.records import Turn
from perl.rl.samplers.base import Sampling
from perl.rl.samplers.local import LocalSampler
from perl.roles.roles import Role
from perl.stages.session import Session
from perl.system.progress import console

TITLES = {Role.BASE: "base", Role.SFT: "SFT", Role.POLICY: "RL policy"}
MAX_NEW_TOKENS = 128


def chat(run: Path) -> None:
    """Read a line, answer it as every role that the run has; the last role's answer goes into the context.

    Raises:
        UserError: this is no run folder, or it has no adapter yet.
    """
    session = open_run(run)
    roles = _load(session)
    generator = torch.Generator(session.device).manual_seed(session.recipe.seed)
    console.print(f"Talking to {', '.join(TITLES[role] for role in roles)}; an empty line ends.")
    turns: list[Turn] = []
    while line := _ask():
        turns.append(Turn("user", line))
        answers = {role: _answer(session, role, turns, generator) for role in roles}
        console.print(Columns([Panel(text or "(nothing)", title=TITLES[role]) for role, text in answers.items()]))
        turns.append(Turn("agent", answers[roles[-1]]))


def _load(session: Session) -> list[Role]:
    """Load the language-model roles that the run has trained."""
    trained = [role for role in (Role.SFT, Role.POLICY) if session.saved(role).exists()]
    for role in trained:
        session.load(role)
    return [Role.BASE, *trained]


def _ask() -> str:
    try:
        return Ask.ask("you", console=console, default="", show_default=False).strip()
    except EOFError:
        return ""


def _answer(session: Session, role: Role, turns: list[Turn], generator: torch.Generator) -> str:
    session.roles.eval()
    room = session.base.context_length - MAX_NEW_TOKENS
    context = tuple(turns)
    temperature = session.recipe.rl.temperature if session.recipe.rl else 1.0
    chat = session.base.chat
    sampling = Sampling(MAX_NEW_TOKENS, temperature, chat.ends(context), chat.pad_id, prompts_at_once=1)
    prompt = chat.context(context, max(room, 1))
    samples = LocalSampler(session.roles).draw(role, [prompt], sampling, generator)
    return chat.decode(samples.completions()[0])
