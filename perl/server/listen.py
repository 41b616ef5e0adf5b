"""The HTTP server, on a port that is opened before anything is loaded."""

import socket
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from perl.errors import UserError

if TYPE_CHECKING:
    import uvicorn

BACKLOG = 2048
"""Number of connections that may wait to be accepted."""
STOP_AFTER = 3
"""Seconds in which requests in progress can finish when the server is stopped."""


def require_server(command: str) -> None:
    """Check that the server's libraries are installed. Raises `UserError`."""
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        what = f"needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
        raise UserError(what, where=f"perl-rlhf {command}", remedy="pip install 'perl-rlhf[rate]'")


def open_port(host: str, port: int) -> socket.socket:
    """Open a listening socket; clients that connect wait until the server runs.

    Args:
        port: 0 for any free port.

    Raises:
        UserError: the port is taken or forbidden, or this machine has no such address.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        cause = getattr(error, "strerror", None) or error
        remedy = "Give another --port (0: any free port), or leave --host out."
        raise UserError(f"cannot listen there: {cause}", where=f"{host}:{port}", remedy=remedy) from None


def address_of(listening: socket.socket) -> str:
    """Return the address, such as http://127.0.0.1:8000; for a wildcard, that of loopback."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listening: socket.socket) -> bool:
    """Return whether only this machine can connect."""
    host: str = listening.getsockname()[0]
    return host == "::1" or host.startswith("127.")


def server_of(app: Callable[..., object]) -> "uvicorn.Server":
    """Create the server of an ASGI application."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=STOP_AFTER,
    )
    return uvicorn.Server(config)


def serve(app: Callable[..., object], listening: socket.socket) -> None:
    """Answer requests until interrupted; raise the exception that interrupts."""
    server_of(app).run(sockets=[listening])
