"""`data fetch`: published data on this machine."""

from typing import Annotated

import typer

from perl.system.progress import console


def data_fetch(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Such as taskmaster-coffee.")],
) -> None:
    """Download a source, checked against pinned hashes."""
    from perl.data.sources import fetch_source

    console.print(f"{source} is in {fetch_source(source)}", markup=False)
