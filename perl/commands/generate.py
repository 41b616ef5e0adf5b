"""`generate`: a role's completions of the prompts in a file."""

from typing import Annotated

import typer

from perl.commands.json_lines import Lines, Out, read_records, write_lines
from perl.commands.options import Run, say_loading
from perl.errors import UserError
from perl.system.progress import console, counted


def generate(
    run: Run,
    roles: Annotated[
        list[str] | None,
        typer.Argument(metavar="ROLE", help="base, sft or policy; if left out, the last trained."),
    ] = None,
    *,
    file: Lines,
    role_option: Annotated[str | None, typer.Option("--role", hidden=True)] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", metavar="N", help="The recipe's by default, or 128.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", metavar="T", help="0: the most likely token; default: the recipe's, or 1."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed for sampling.")] = 0,
    out: Out = None,
) -> None:
    """Generate a role's completions of the prompts in a file: JSON Lines that `score` and `data check` read."""
    say_loading()
    from perl.library import load_run
    from perl.rl.rewards.function import messages

    roles = roles or [role_option or ""]
    if len(roles) > 1:
        raise UserError(f"{len(roles)} roles are given: {', '.join(roles)}", where="ROLE", remedy="Name one.")
    contexts = [record.context for _, _, record in read_records(file)]
    loaded = load_run(run)
    role = roles[0] or next(reversed(loaded.policies), "policy")
    texts = loaded.complete(contexts, role, max_new_tokens, temperature, seed)
    pairs = zip(contexts, texts, strict=True)
    write_lines(out, ({"prompt": messages(context), "completion": text, "role": role} for context, text in pairs))
    if empty := sum(not text.strip() for text in texts):
        console.print(f"{role} ended {counted(empty, 'completion')} immediately: their score will be null.")
