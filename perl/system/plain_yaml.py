"""YAML without its traps, for recipes: no key twice, where the later one would win in silence, and no aliases."""

from pathlib import Path
from typing import Any

import yaml

from perl.errors import UserError, machine_fault


class _PlainLoader(yaml.SafeLoader):
    """Aliases are refused: a recipe stands for itself, and an alias can contain itself or stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"alias *{event.anchor}: write it out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception:  # for a value under a wrong tag, such as `!!float x`, it raises all sorts
            what = f"{str(node.value)[:40]!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def parse(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        ValueError: it is not plain YAML; the message says why, on one line.
    """
    try:
        return yaml.load(text, _PlainLoader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.YAMLError as error:
        reason = str(error).replace('in "<unicode string>", ', "at ")
        raise ValueError(" ".join(reason.split())) from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a recipe file.

    Raises:
        UserError: no such file, not UTF-8, not plain YAML, or not a mapping.
    """
    where = str(path)
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        remedy = "Check the path; see recipes/ for complete ones."
        raise UserError("no such recipe", where=where, remedy=remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        remedy = "A recipe is a YAML file in UTF-8."
        raise machine_fault(error) or UserError(f"cannot be read: {error}", where=where, remedy=remedy) from None
    except ValueError as error:
        raise UserError(f"not valid YAML: {error}", where=where, remedy="Mend the line named.") from None
    if not isinstance(content, dict):
        remedy = "See recipes/quickstart.yaml."
        raise UserError("a recipe is a mapping of keys to values", where=where, remedy=remedy)
    return content
