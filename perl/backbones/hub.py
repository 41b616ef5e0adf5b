"""Whether the hub can be reached: without network its library tries for half a minute and then blames the name."""

import functools

from huggingface_hub import constants, get_session
from huggingface_hub.errors import LocalEntryNotFoundError

SECONDS = 5.0
"""Timeout of the request."""


@functools.cache
def why_not_asked() -> str:
    """Why the hub is not asked for models, in words; empty if it is.

    Checked once a process; if the hub cannot be reached, libraries read only from their cache from then on.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # the name, the proxy, the certificate, the time: all mean that nobody answers
        constants.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} cannot be reached: {str(error) or type(error).__name__}"
    return ""


def only_in_cache(error: BaseException | None) -> bool:
    """Whether an exception means that the cache has no such model and the hub was not asked."""
    while error is not None and not isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__ or error.__context__
    return error is not None
