"""The section `data`: where the records come from."""

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from perl.data.sources import find_source
from perl.recipe.section import Section, nearest

COLUMNS = ("prompt", "completion", "label", "chosen", "rejected", "messages", "dialogue", "margin", "probability")
"""Fields that a column can be mapped to."""


class Data(Section):
    """Where the records come from."""

    source: str = "coffee-simulator"
    """A name in `SOURCES` in perl/data/sources.py."""
    path: str | None = None
    """A folder or file that the source reads instead of its own data. The source is then jsonl unless one is
    given."""
    eval_path: str | None = None
    """A file in the same format to use as the held-out data; all of `path` is then used for training."""
    columns: dict[str, str] = Field(default={})
    """Column names in the file by field name of TRL's formats: `{completion: response, label: rating}`."""
    chat: bool = False
    """Whether to put plain text into the base's chat format, with prompts as the user's messages and completions
    as the assistant's. Otherwise it is used unchanged, which suits bases that are not chat models."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the dialogues held out for evaluation; not used if the source was published with a test split."""

    @model_validator(mode="before")
    @classmethod
    def _a_path_alone_is_a_file(cls, given: Any) -> Any:
        return {"source": "jsonl", **given} if isinstance(given, dict) and given.get("path") else given

    @field_validator("columns")
    @classmethod
    def _are_known(cls, columns: dict[str, str]) -> dict[str, str]:
        if unknown := [field for field in columns if field not in COLUMNS]:
            raise ValueError(f"a row has no field {unknown[0]!r}: {nearest(unknown[0], COLUMNS)}")
        return columns

    @field_validator("source")
    @classmethod
    def _is_known(cls, source: str) -> str:
        find_source(source)
        return source
