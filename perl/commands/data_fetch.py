"""`data fetch`: published data on this machine."""

from typing import Annotated

import typer

from perl.system.progress import console


def data_fetch(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Such as taskmaster-coffee.")],
) -> None:
    """Download a source, checked against pinned hashes."""
    from perl.data.fetch import fetch

    console.print(f"{source} is in {fetch(source)}", markup=False)
