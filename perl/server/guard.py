"""Access control: requests of this machine's own page or commands, never of other pages in the same browser."""

import ipaddress
import secrets
import socket
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

READS = ("GET", "HEAD")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware that answers forbidden requests with an empty 403.

    - `Host` must be an address, localhost or this machine's name: DNS rebinding needs the attacker's own name.
    - A request from another page (CSRF) has that page's `Origin`.
    - A token, if set, must be in the address, in the cookie that the page then gets, or in Authorization: Bearer.

    Args:
        any_host: accept any name for this machine, for a port that is open to others.
        token: None: everyone who reaches the port is allowed.
        cookie: name of the cookie, since all ports of a host share cookies.
    """

    def __init__(
        self, app: ASGIApp, *, any_host: bool = False, token: str | None = None, cookie: str = "token"
    ) -> None:
        self._app, self._any_host, self._token, self._cookie = app, any_host, token, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on allowed requests, and add the headers that isolate the page."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                if self._token is not None and self._is_token(request.query_params.get("token")):
                    cookie = f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict"
                    headers.append("Set-Cookie", cookie)
            await send(message)

        allowed = self._is_host(request) and self._is_own_page(request) and self._has_token(request)
        app = self._app if allowed else Response(status_code=403)
        await app(scope, receive, send_with_headers if allowed else send)

    def _is_host(self, request: Request) -> bool:
        try:
            name = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
            own = self._any_host or name in ("localhost", socket.gethostname().lower())
            return own or bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    def _is_own_page(self, request: Request) -> bool:
        """Check the Origin, which browsers send except for plain reads; commands send neither it nor cookies."""
        origin = request.headers.get("origin")
        if origin is None:
            return request.method in READS or self._token is None or "authorization" in request.headers
        return origin == f"{request.url.scheme}://{request.headers.get('host')}"

    def _has_token(self, request: Request) -> bool:
        if self._token is None:
            return True
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        given = (request.query_params.get("token"), request.cookies.get(self._cookie), bearer)
        return any(self._is_token(one) for one in given)

    def _is_token(self, given: str | None) -> bool:
        return bool(given and self._token) and secrets.compare_digest(
            str(given).encode(), str(self._token).encode()
        )
