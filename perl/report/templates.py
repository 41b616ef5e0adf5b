"""The package's templates, filled in."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from perl.report.numbers import decimal, number, signed
from perl.system.progress import counted


def filled(template: str, content: Mapping[str, Any]) -> str:
    """A template's text, escaped where it is HTML: the same content gives the same text."""
    loader = PackageLoader("perl", "report")
    environment = Environment(
        loader=loader,
        autoescape=".html" in template,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(signed=signed, decimal=decimal, number=number, counted=counted)
    style = Markup(loader.get_source(environment, "page.css")[0])
    return environment.get_template(template).render(style=style, **content)
