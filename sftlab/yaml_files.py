"""What does a YAML file of settings hold? Read it without importing a heavy library."""

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

RECIPE_HINT = "give the path of a YAML file, for example recipes/demo/attn_r16.yaml"
# A settings file has some hundred bytes and values.
MOST_BYTES = 256 * 1024
MOST_VALUES = 10_000
MOST_LEVELS = 50


class _Loader(yaml.SafeLoader):
    """yaml's safe loader, which also refuses keys that are no text and keys that stand twice."""

    level = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Returns the next node; raises ConstructorError where it is nested too deeply."""
        self.level += 1
        if self.level > MOST_LEVELS:
            mark, problem = self.peek_event().start_mark, f"more than {MOST_LEVELS} levels"
            raise yaml.constructor.ConstructorError(None, None, problem, mark)
        node = super().compose_node(parent, index)
        self.level -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Returns a mapping; raises ConstructorError for such keys."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                shown = getattr(key, "value", "") if isinstance(key, yaml.ScalarNode) else key.id
                raise _at(key, f"the key {shown} is no text: put it in quotes")
            if key.value in seen:
                raise _at(key, f"{key.value} stands there twice: leave one of the two")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(
    path: str | os.PathLike,
    what: str = "recipe",
    hint: str = RECIPE_HINT,
    folder: Path = Path(),
) -> dict[str, Any]:
    """Returns the fields of a YAML file of settings; a relative path is taken from `folder`.

    Raises ValueError for a missing file (with `hint`), one that is too large or not YAML, one
    without fields, and one with a key twice or with a key that is no text.
    """
    file = folder / path
    if not file.is_file():
        raise ValueError(f"{what} {path} not found: {hint}")
    if (size := file.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes: a {what} has at most {MOST_BYTES:,}")
    try:
        settings = _load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be read: {error.strerror}") from error
    except yaml.constructor.ConstructorError as error:
        place = f"line {error.problem_mark.line + 1}" if error.problem_mark else "somewhere"
        raise ValueError(f"{path}, {place}: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except (ValueError, OverflowError) as error:  # a date or a number that is none
        raise ValueError(f"{path} holds a value that YAML cannot read: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold 'field: value' lines, got {type(settings).__name__}")
    return settings


def _load(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count(node: yaml.Node, counted: dict[int, int], within: set[int]) -> int:
    """Returns the values of a node with its aliases written out.

    Raises ConstructorError for more than `MOST_VALUES`, and for a node that holds itself.
    """
    if id(node) in within:
        raise _at(node, "a value holds itself: write it out")
    if id(node) in counted:
        return counted[id(node)]
    within.add(id(node))
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [one for pair in node.value for one in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    total = 1 + sum(_count(child, counted, within) for child in children)
    if total > MOST_VALUES:
        raise _at(node, f"more than {MOST_VALUES:,} values with the aliases written out")
    within.remove(id(node))
    counted[id(node)] = total
    return total


def _at(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
