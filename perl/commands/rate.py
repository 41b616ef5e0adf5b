"""`rate`: a page on which people rate a run's completions."""

import secrets
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from perl.commands.options import Host, Port, Run, one_of
from perl.errors import UserError
from perl.system.progress import console, silence


def rate(
    run: Run,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Append to it; RUN/ratings.jsonl by default.")
    ] = None,
    port: Port = 8010,
    host: Host = "127.0.0.1",
    choose: Annotated[
        str,
        typer.Option(
            "--choose", metavar="HOW", help="random, or uncertainty: half are what the reward model is unsure of."
        ),
    ] = "random",
    raters: Annotated[
        str | None,
        typer.Option("--raters", metavar="NAMES", help="Who may rate, separated by commas; anyone by default."),
    ] = None,
) -> None:
    """Rate a run's completions in the browser: thumbs, corrections and pairs, saved as JSON Lines for training."""
    from perl.library import load_run
    from perl.rating.questions import CHOICES, Questions
    from perl.server.listen import address_of, is_loopback, open_port, require_server, serve

    one_of("--choose", choose, list(CHOICES))
    require_server("rate")
    from perl.rating.app import RatingApp
    from perl.rating.log import RatingLog
    from perl.runs.folder import RunFolder
    from perl.server.guard import Guard

    RunFolder(run).recipe()  # no file is created in a folder that is not a run's
    names = [name.strip() for name in (raters or "").split(",") if name.strip()]
    if raters is not None and not names:  # such as from an unset shell variable, which must not admit everyone
        remedy = "Give names separated by commas; without --raters anyone may rate."
        raise UserError("contains no name", where="--raters", remedy=remedy)
    with open_port(host, port) as listening, closing(RatingLog(out or run / "ratings.jsonl")) as log:
        with silence():  # the address is the first line
            questions = Questions(load_run(run), choose)
        app, token = RatingApp(questions, log, names, str(run)).routes(), secrets.token_urlsafe(24)
        print(f"{address_of(listening)}/?token={token}", flush=True)
        console.print(f"Open this address to rate; ratings go to {log.file}. Ctrl-C stops it.", markup=False)
        exposed = not is_loopback(listening)
        if exposed:
            console.print("Others can reach this port over plain HTTP: give the address only to raters.")
        cookie = f"perl-rate-{listening.getsockname()[1]}"
        serve(Guard(app, any_host=exposed, token=token, cookie=cookie), listening)
