"""The JSON bodies of requests."""

from typing import TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request

from perl.system.typed_json import parse

T = TypeVar("T")
MAX_BODY_BYTES = 1_000_000


async def body_of(request: Request, kind: type[T]) -> T:
    """Parse the body as a dataclass.

    Raises:
        HTTPException: it is too long, or not JSON according to its header.
        UserError: a field is missing or of another type.
    """
    # A foreign page can send a form or plain text without a preflight request, but not JSON.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "send application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is longer than {MAX_BODY_BYTES:,} bytes")
    try:
        return parse(kind, body.decode("utf-8", "replace"), "the request", "Correct this field.")
    except RecursionError:
        raise HTTPException(400, "nested too deeply") from None
