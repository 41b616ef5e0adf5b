"""`chat`: talk to base, SFT and RL policy side by side in the terminal."""

from rich.columns import Columns
from rich.panel import Panel
from rich.prompt import Prompt

from perl.commands.options import Run, say_loading
from perl.system.progress import console

TITLES = {"base": "base", "sft": "SFT", "policy": "RL policy"}
MAX_NEW_TOKENS = 128


def chat(run: Run) -> None:
    """Talk to base, SFT and RL policy side by side."""
    say_loading()
    from perl.data.records import Turn
    from perl.library import load_run

    loaded = load_run(run)
    roles = loaded.policies
    console.print(f"Talking to {', '.join(TITLES[role] for role in roles)}; an empty line ends the chat.")
    plain = bool(prompts := loaded.session.train.prompts) and prompts[0].context[-1].speaker == "text"
    if plain:
        console.print("The run's prompts are plain text: each line is completed separately.")
    length = min(MAX_NEW_TOKENS, loaded.session.base.context_length // 2)
    turns: list[Turn] = []
    while line := _ask():
        turns = [Turn("text", line)] if plain else [*turns, Turn("user", line)]
        texts = [loaded.complete([tuple(turns)], role, length, seed=len(turns))[0] for role in roles]
        panels = zip(roles, texts, strict=True)
        console.print(Columns([Panel(text or "(nothing)", title=TITLES[role]) for role, text in panels]))
        turns.append(Turn("agent", texts[-1]))  # the last role's completion goes into the context


def _ask() -> str:
    try:
        return Prompt.ask("you", console=console, default="", show_default=False).strip()
    except EOFError:
        return ""
