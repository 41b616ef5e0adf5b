"""The package's templates, filled in."""

import functools
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from perl.report.numbers import decimal, number, signed
from perl.system.progress import counted


def filled(template: str, content: Mapping[str, Any]) -> str:
    """A template's text, escaped where it is HTML: the same content gives the same text."""
    return _environment(".html" in template).get_template(template).render(**content)


@functools.cache  # it keeps the compiled templates
def _environment(escaped: bool) -> Environment:
    """The templates and what they can call, with the page's style."""
    loader = PackageLoader("perl", "report")
    environment = Environment(
        loader=loader,
        autoescape=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(signed=signed, decimal=decimal, number=number, counted=counted)
    environment.globals["style"] = Markup(loader.get_source(environment, "page.css")[0])
    return environment
