"""Reading a recipe's text: YAML or `key=value` words, to one flat mapping with dotted keys."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
SECTIONS = ("data", "data.columns", "data.roles", "head", "method", "rewards", "sampling", "teacher", "train")
#: The most bytes of a recipe; shipped ones have at most a few thousand.
MOST_TEXT = 2**16
#: The most values in a recipe, and the deepest nesting of lists and mappings.
MOST_VALUES, MOST_LEVELS = 20_000, 32
MOST_KEYS = 500


def read_yaml(text: str, kind: str = "recipe") -> tuple[dict[str, Any], list[str]]:
    """The flat mapping of a recipe, or of another file of that form (`kind`), and mistakes in its form.

    `train: {lr: 1.0e-3}` and `train.lr: 1.0e-3` are the same; a key given twice in either spelling is refused.
    Only plain YAML values are built (safe_load's rules); a value below the second level stays a value.
    """
    if len(text) > MOST_TEXT:
        return {}, [f"not readable as YAML: {len(text):,} characters, and a {kind} has at most {MOST_TEXT:,}"]
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        # Repetitions by aliases are counted, so that a few lines can't expand to billions of values.
        _check_size(root)
    except yaml.YAMLError as error:
        return {}, [f"not readable as YAML: {_where(error)}"]
    except RecursionError:
        return {}, ["not readable as YAML: it nests too deep"]
    if root is None:
        start = "; `ziggurat recipes` lists some to start from" if kind == "recipe" else ""
        return {}, [f"the {kind} is empty{start}"]
    if not isinstance(root, yaml.MappingNode):
        return {}, [f"a {kind} is a mapping of `key: value` lines, this is a {_kind(root)}"]
    flat: dict[str, Any] = {}
    problems: list[str] = []
    lines: dict[str, int] = {}
    leaves = list(_leaves(root))
    if len(leaves) > MOST_KEYS:  # finding hints for unknown keys takes time
        return {}, [f"{len(leaves):,} keys, and a {kind} has at most {MOST_KEYS}"]
    for prefix, key_node, value_node in leaves:
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"line {key_node.start_mark.line + 1}: a key is a word, this is a {_kind(key_node)}")
            continue
        key = f"{prefix}{key_node.value}"
        line = key_node.start_mark.line + 1
        if key in lines:
            problems.append(f"{key}: given twice, in line {lines[key]} and in line {line}; keep one")
            continue
        lines[key] = line
        try:
            flat[key] = _value(value_node)
        except yaml.YAMLError as error:
            problems.append(f"{key}: {_where(error)}")
        except (ValueError, OverflowError) as error:  # a date that is none, a number of too many digits
            problems.append(f"{key}: {error}")
    return flat, problems


def read_overrides(words: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """`train.lr=1.0e-3` words as a flat mapping; each value is read as one YAML value."""
    flat: dict[str, Any] = {}
    problems: list[str] = []
    for word in words:
        key, sign, text = word.partition("=")
        key = key.strip()
        if not sign or not key:
            problems.append(f"'{word}' is not of the form key=value (for example train.lr=1.0e-3)")
        elif key in flat:
            problems.append(f"{key}: given twice on the command line; keep one")
        else:
            try:
                flat[key] = _numbers(yaml.safe_load(text)) if text.strip() else None
            except (yaml.YAMLError, ValueError, RecursionError):
                # A text with a colon or a bracket may be invalid YAML, but on a command line it is a text.
                flat[key] = text
    return flat, problems


def _numbers(value: Any) -> Any:
    """A value, or a list's values, in which `2e-4`, which YAML 1.1 takes for a text, is the number."""
    if isinstance(value, list):
        return [_numbers(part) for part in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested or dotted Python mapping as the flat one."""
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        key = f"{prefix}{name}"
        if key in SECTIONS and isinstance(value, dict):
            flat.update(flatten(value, f"{key}."))
        else:
            flat[key] = value
    return flat


def _leaves(node: yaml.MappingNode, prefix: str = "") -> Iterable[tuple[str, yaml.Node, yaml.Node]]:
    """Section prefix, key and value of every leaf, that is of everything except sections."""
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode) and f"{prefix}{key.value}" in SECTIONS:
            yield from _leaves(value, f"{prefix}{key.value}.")
        else:
            yield prefix, key, value


def _value(node: yaml.Node) -> Any:
    """The plain Python value of one node, by the safe constructors only, duplicate keys refused."""
    for inner in _mappings(node):
        seen: set[str] = set()
        for key, _ in inner.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"the key in line {key.start_mark.line + 1} is a {_kind(key)}, a key is a word")
            if key.value in seen:
                raise yaml.YAMLError(f"'{key.value}' is given twice in line {key.start_mark.line + 1}")
            seen.add(key.value)
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _mappings(node: yaml.Node) -> Iterable[yaml.MappingNode]:
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from _mappings(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _mappings(value)


def _check_size(root: yaml.Node | None) -> None:
    """Raise YAMLError if there are too many values in `root`, aliases followed, or if they nest too deep."""
    count, level, depth = 0, [] if root is None else [root], 0
    while level:
        count += len(level)
        if count > MOST_VALUES:
            raise yaml.YAMLError(f"more than {MOST_VALUES:,} values, with those that aliases repeat counted each time")
        if depth > MOST_LEVELS:
            raise yaml.YAMLError(f"lists and mappings nest deeper than {MOST_LEVELS} levels")
        level, depth = [inner for node in level for inner in _parts(node)], depth + 1


def _parts(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _kind(node: yaml.Node) -> str:
    return "list" if isinstance(node, yaml.SequenceNode) else "single value"


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    text = problem or str(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {text}" if mark is not None else text
