"""YAML for recipes, without aliases and without duplicate keys, of which the last would silently win."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from perl.errors import UserError, machine_fault


class _PlainLoader(yaml.SafeLoader):
    """Loader that refuses duplicate keys, bytes, and aliases, which can contain themselves or expand to gigabytes.

    Bytes would be accepted as text without having been resolved as a path.
    """

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
        except Exception:  # of various types, for a value with a wrong tag such as `!!float x`
            what = f"{str(node.value)[:40]!r} is not a valid {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from None

    def construct_yaml_binary(self, node: yaml.Node) -> bytes:
        raise yaml.constructor.ConstructorError(None, None, "!!binary: write it as text", node.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_PlainLoader.add_constructor("tag:yaml.org,2002:binary", _PlainLoader.construct_yaml_binary)


def parse(text: str) -> Any:
    """Return the value of a YAML document.

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
    """Return the keys and values of a recipe file.

    Raises:
        UserError: no such file, not UTF-8, not plain YAML, or not a mapping.
    """
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what, remedy, fault = "no such recipe", "Check the path; see recipes/ for complete recipes.", None
    except (OSError, UnicodeDecodeError) as error:
        what, remedy, fault = f"cannot be read: {error}", "A recipe is a YAML file in UTF-8.", machine_fault(error)
    except ValueError as error:
        what, remedy, fault = f"not valid YAML: {error}", "Fix this line.", None
    else:
        if isinstance(content, dict):
            return content
        what, remedy, fault = "a recipe is a mapping of keys to values", "See recipes/quickstart.yaml.", None
    raise fault or UserError(what, where=str(path), remedy=remedy)


def flat_keys(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return the values of nested mappings, also in lists, by their full keys, as in `rl.reward.0.kind`."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            value = {str(number): one for number, one in enumerate(value)}
        flat |= flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
