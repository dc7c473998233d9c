"""Checks whether a YAML value fits a type, with the reason in plain words if not."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from ziggurat.nearest import did_you_mean

_EXPONENT = re.compile(r"([+-]?)(\d+)(\.\d*)?[eE]([+-]?\d+)")
#: Kind of pydantic's error -> the key of its bound, and the bound in words.
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
#: Kind of pydantic's error -> the allowed values.
_NEEDED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "set_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
}


def key_problems(descriptions: Mapping[str, Any], values: Mapping[Any, Any]) -> Iterator[str]:
    """Mistakes in `values` by pydantic's descriptions of the known keys: unknown or missing keys, and wrong values."""
    for key in values:
        if key not in descriptions:
            yield f"{key}: unknown{did_you_mean(str(key), descriptions) or ', one of ' + ', '.join(descriptions)}"
    for key, info in descriptions.items():
        if info.is_required() and not values.get(key):
            yield f"{key}: missing: {info.description}"
        elif key in values and (fault := fault_of(info, values[key])) is not None:
            yield f"{key}: {fault} [{info.description}]" if info.description else f"{key}: {fault}"


def fault_of(info: Any, value: Any) -> str | None:
    """`explain` for the value of a key, by pydantic's description of the key."""
    return explain(Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation, value)


def explain(hint: Any, value: Any) -> str | None:
    """None if `value` fits `hint` without a conversion that could hide a mistake; else the mistake and a remedy.

    YAML 1.1 reads `4e-4` and `1E5` as texts, so the error for a text in place of a number tells how to write the
    number. Lists and mappings are allowed to become tuples, sets, enums and dataclasses, since YAML has no other way to
    write those. No key has a meaning for an infinite number, or for NaN.
    """
    if (number := _not_finite(value)) is not None:
        return f"must be a finite number, got {number}" + (f" in {value}" if number is not value else "")
    try:
        adapter = TypeAdapter(hint)
    except (PydanticSchemaGenerationError, TypeError, NameError):
        return None
    try:
        adapter.validate_python(value, strict=True)
        return None
    except ValidationError as error:
        problem = error
    except NameError:
        return None
    if isinstance(value, (list, dict)) or (isinstance(value, str) and not _wants_number(problem)):
        try:
            adapter.validate_python(value)
            return None
        except ValidationError as error:
            problem = error
    return _words(problem, value)


def _not_finite(value: Any) -> float | None:
    """The first number in `value` that is infinite or NaN."""
    if isinstance(value, float):
        return None if math.isfinite(value) else value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
    return next((number for item in inner if (number := _not_finite(item)) is not None), None)


def _wants_number(error: ValidationError) -> bool:
    kinds = {item["type"].split("_")[0] for item in error.errors()}
    return bool(kinds & {"int", "float", "bool"})


def _words(error: ValidationError, value: Any) -> str:
    errors = error.errors(include_url=False)
    kinds = [item["type"] for item in errors]
    numeric = [kind for kind in kinds if kind in {"int_type", "float_type", "int_parsing", "float_parsing"}]
    if isinstance(value, str) and numeric:
        literals = [item for item in errors if item["type"] == "literal_error"]
        if literals and _number(value) is None:
            allowed, hint = _literal_list(literals[0]), _nearest_literal(literals[0], value)
            return f"'{value}' is neither {allowed} nor a number{hint}"
        return _text_for_number(value, whole=all(kind.startswith("int") for kind in numeric))
    # In a union the most specific error is best: a violated bound tells more than a wrong type.
    ranked = sorted(errors, key=lambda item: item["type"].endswith("_type"))
    item = ranked[0]
    kind, context = item["type"], item.get("ctx", {})
    shown = _shown(value)
    if kind == "literal_error":
        other = next(filter(None, map(_allowed, errors)), None)
        named = f"not one of {_literal_list(item)}" if other is None else f"neither {_literal_list(item)} nor {other}"
        return f"{shown} is {named}{_nearest_literal(item, str(value))}"
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"must be {words} {context[key]}, got {shown}"
    names = list(dict.fromkeys(_NEEDED[kind] for kind in kinds if kind in _NEEDED))
    if names:
        quotes = "; put it in quotes" if names == ["a text"] and isinstance(value, (int, float)) else ""
        return f"needs {' or '.join(names)}, got {shown}{quotes}"
    return f"{item['msg'][0].lower()}{item['msg'][1:]}, got {shown}"


def _allowed(item: Any) -> str | None:
    """The values that the alternative of an error in a union allows, if it is none of named values."""
    if item["type"] not in _BOUNDS:
        return _NEEDED.get(item["type"])
    key, words = _BOUNDS[item["type"]]
    bound = item["ctx"][key]
    return f"a {'whole ' if isinstance(bound, int) else ''}number {words} {bound}"


def _text_for_number(text: str, whole: bool) -> str:
    match, number = _EXPONENT.fullmatch(text.strip()), _number(text)
    if match is not None and number is not None:
        sign, digits, fraction, exponent = match.groups()
        exponent = exponent if exponent[0] in "+-" else f"+{exponent}"
        fraction = fraction if fraction and fraction != "." else ".0"
        return f"'{text}' is text to YAML, write {sign}{digits}{fraction}e{exponent}"
    if number is not None:
        return f"'{text}' is text to YAML, write {text.strip()} without quotes"
    return f"needs a {'whole ' if whole else ''}number, got '{text}'"


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _literal_list(item: Any) -> str:
    return str(item["ctx"]["expected"]).replace("'", "").replace(" or ", ", ")


def _nearest_literal(item: Any, value: str) -> str:
    return did_you_mean(value, _literal_list(item).split(", "))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "nothing" if value is None else repr(value)
