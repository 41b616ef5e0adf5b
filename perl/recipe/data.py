"""The section `data`: where the records come from."""

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from perl.data.sources import find_source
from perl.recipe.section import Section, nearest

COLUMNS = ("prompt", "completion", "label", "chosen", "rejected", "messages", "dialogue", "margin", "probability")
"""What a column can be."""


class Data(Section):
    """Where the records come from."""

    source: str = "coffee-simulator"
    """A name in `SOURCES`, perl/data/sources.py."""
    path: str | None = None
    """A folder or file that the source reads instead of its own. The source is then jsonl, if none is given."""
    eval_path: str | None = None
    """A file of the same form that is held out as it is; then all of `path` is trained on."""
    columns: dict[str, str] = Field(default={})
    """Names in the file, by the names of TRL's formats: `{completion: response, label: rating}`."""
    chat: bool = False
    """Whether plain text is a chat: prompts the user's messages, completions the assistant's, in the base's chat
    format. Without it plain text stands as it is, which suits bases that are no chat models."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the dialogues kept for evaluation; not read where a source was published with a test part."""

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
