"""Renders the package's templates."""

import base64
import functools
import hashlib
from collections.abc import Mapping

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from perl.report.numbers import decimal, number, signed, true_minus
from perl.system.progress import counted


def filled(template: str, content: Mapping[str, object]) -> str:
    """Render a template, escaped if it is HTML; the same content gives the same text."""
    return _environment(".html" in template).get_template(template).render(**content)


@functools.cache  # keeps the compiled templates
def _environment(escaped: bool) -> Environment:
    """Return the templates' environment, with their filters and the page's style and script."""
    loader = PackageLoader("perl", "report")
    environment = Environment(
        loader=loader,
        autoescape=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        signed=signed, decimal=decimal, number=number, counted=counted, true_minus=true_minus
    )
    style, script = (Markup(loader.get_source(environment, name)[0]) for name in ("page.css", "copy.js"))
    # The browser only runs a script with this hash.
    digest = base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode()
    environment.globals.update(style=style, script=script, script_sha256=digest)
    return environment
