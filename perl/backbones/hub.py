"""Check whether the hub can be reached: offline, its library retries for half a minute and blames the name."""

import functools

from huggingface_hub import constants, get_session
from huggingface_hub.errors import LocalEntryNotFoundError

SECONDS = 5.0
"""Timeout of the request in seconds."""


@functools.cache
def why_not_asked() -> str:
    """Return why the hub is not queried for models; empty if it is.

    Checked once per process; if the hub cannot be reached, libraries only read from their cache from then on.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # DNS, proxy, certificate, timeout: in all cases it cannot be reached
        constants.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} cannot be reached: {str(error) or type(error).__name__}"
    return ""


def only_in_cache(error: BaseException | None) -> bool:
    """Return whether an exception means that the cache lacks the model and the hub was not queried."""
    while error is not None and not isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__ or error.__context__
    return error is not None
