"""The section `data`: where the records come from."""

from typing import Annotated

from pydantic import Field, field_validator

from perl.data.sources import find_source
from perl.recipe.section import Section


class Data(Section):
    """Where the records come from."""

    source: str = "coffee-simulator"
    """A name in `SOURCES`, perl/data/sources.py."""
    path: str | None = None
    """A folder or file that the source reads instead of its own."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the dialogues kept for evaluation; not read where a source was published with a test part."""

    @field_validator("source")
    @classmethod
    def _is_known(cls, source: str) -> str:
        find_source(source)
        return source
