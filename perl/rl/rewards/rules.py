"""Rules as rewards: 1 if a completion satisfies the rule, else 0."""

import re
from collections.abc import Mapping, Sequence

from perl.data.answers import AnswerKind, check_references, is_right
from perl.data.records import JSON, Prompt
from perl.data.rows import RowError, strict_json
from perl.errors import UserError
from perl.rl.rewards.base import RewardSource
from perl.rl.samplers.base import Samples


class Math(RewardSource):
    """Whether the answer equals the reference, which is a column of the prompt.

    Args:
        prompts: all prompts with which it will be called.

    Raises:
        UserError: a prompt has no usable reference, or the package for LaTeX is missing.
    """

    name = "math"
    is_rule = True

    def __init__(self, kind: AnswerKind, column: str, prompts: Sequence[Prompt]) -> None:
        self._kind, self._column = kind, column
        check_references(kind, column, prompts, self.where)
        if prompts:
            is_right(kind, "", prompts[0].columns[column])  # raises now if the package is missing

    def rewards(self, prompts: Sequence[Prompt], samples: Samples, texts: Sequence[str]) -> list[float]:
        both = zip(prompts, texts, strict=True)
        return [float(is_right(self._kind, text, prompt.columns[self._column])) for prompt, text in both]


class Regex(RewardSource):
    """Whether the completion, without leading and trailing whitespace, contains a match of the pattern."""

    name = "regex"
    is_rule = True

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern)

    def rewards(self, prompts: object, samples: object, texts: Sequence[str]) -> list[float]:
        return [float(self._pattern.search(text.strip()) is not None) for text in texts]


class JsonSchema(RewardSource):
    """Whether the completion is JSON that conforms to the schema.

    Raises:
        UserError: the schema is invalid, or the package is missing.
    """

    name = "json_schema"
    is_rule = True

    def __init__(self, schema: Mapping[str, JSON]) -> None:
        try:
            from jsonschema import SchemaError
            from jsonschema.validators import Draft202012Validator, validator_for
        except ImportError:
            remedy = "Run `pip install 'perl-rlhf[rules]'`."
            raise UserError("JSON schemas need the package jsonschema", where=self.where, remedy=remedy) from None
        kind = validator_for(schema, default=Draft202012Validator)
        try:
            kind.check_schema(schema)
        except SchemaError as error:
            what = f"is not a JSON schema: {error.message}"
            raise UserError(what, where=f"rl.reward.json_schema {error.json_path}", remedy="Correct it.") from None
        self._validator = kind(schema)

    def rewards(self, prompts: object, samples: object, texts: Sequence[str]) -> list[float]:
        return [float(self._allows(text)) for text in texts]

    def _allows(self, text: str) -> bool:
        try:
            return bool(self._validator.is_valid(strict_json(text)))
        except (RowError, RecursionError):  # the latter if nested too deeply for a recursive schema
            return False
