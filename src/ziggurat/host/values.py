"""The fields of a config, and checks of their values, whose errors name the given value and the allowed ones."""

import re
from collections.abc import Callable
from dataclasses import field
from numbers import Integral
from os import PathLike
from re import _constants as op  # pyright: ignore[reportAttributeAccessIssue]
from re import _parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

from ziggurat.errors import ConfigError

#: No matrix in use has more rows; a rank above is a slip or an attack.
MOST_RANK = 2**16
#: The most entries of a list or dict in a config.
MOST_ENTRIES = 100_000
MOST_ALPHA = 1e9
#: Fields of an adapter's config that don't change its outputs.
NO_MATTER = frozenset(
    {"inference_mode", "peft_version", "ziggurat_version", "ziggurat_format", "base_model_name_or_path", "revision"}
    | {"auto_mapping", "task_type", "lora_dropout", "init_weights", "sites", "freeze_tiers", "from_adapter", "bank"}
)
#: Repeats without end in one regular expression; matching takes the length of a path to that power.
MOST_REPEATS = 4


#: Takes a field's name and its value, and raises ConfigError unless the value is allowed.
Check = Callable[[str, Any], None]


def option(default: Any, about: str, check: Check | None = None) -> Any:
    """A field of a config. `check` looks at its value, but for None where that is the default."""
    return field(default=default, metadata={"help": about, "check": check})


def is_whole(value: Any, least: int, most: float = float("inf")) -> bool:
    """Whether `value` is an int, and no bool, from `least` to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """`value` for an error, cut if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of more digits than Python prints, or a list within itself
        return f"<{type(value).__name__}>"
    return text if len(text) <= 100 else f"{text[:97]}..."


def check_rank(name: str, value: Any) -> None:
    """Raise ConfigError unless `value` can be a rank."""
    if not is_whole(value, 1):
        raise ConfigError(f"{name}={shown(value)}: the rank must be a whole number of at least 1.")
    if value > MOST_RANK:
        raise ConfigError(f"{name}={shown(value)}: no matrix has room for such a rank; at most {MOST_RANK:,}.")


def whole(least: int, most: int = MOST_RANK) -> Check:
    """The check for a whole number from `least` to `most`."""

    def check(name: str, value: Any) -> None:
        if not is_whole(value, least, most):
            raise ConfigError(
                f"{name}={shown(value)}: a whole number of at least {least} is needed (at most {most:,})."
            )

    return check


def one_of(*allowed: Any) -> Check:
    """The check for one of several values. True and 1 are two."""

    def check(name: str, value: Any) -> None:
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            *others, last = map(repr, allowed)
            raise ConfigError(f"{name}={shown(value)}: {', '.join(others)} or {last}.")

    return check


def by_target(check: Check) -> Check:
    """The check for a mapping of target modules, or the ends of their paths, to values that `check` looks at."""

    def check_all(name: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise ConfigError(f"{name}={shown(value)}: target modules with values are needed, such as {{'query': 4}}.")
        check_names(name, list(value))
        for key, of_target in value.items():
            check_pattern(f"a key of {name}", key)
            check(f"{name}[{shown(key)}]", of_target)

    return check_all


def check_above_zero(name: str, value: Any) -> None:
    """Raise ConfigError unless `value` is a number above 0 that a scale can be made of."""
    if not is_number(value) or not 0 < value <= MOST_ALPHA:
        raise ConfigError(f"{name}={shown(value)}: a finite number above 0 is needed (at most {MOST_ALPHA:g}).")


def check_probability(name: str, value: Any) -> None:
    """Raise ConfigError unless `value` is a number from 0 up to, not including, 1."""
    if not is_number(value) or not 0 <= value < 1:
        raise ConfigError(f"{name}={shown(value)}: a probability from 0 up to, not including, 1.")


def check_flag(name: str, value: Any) -> None:
    """Raise ConfigError unless `value` is True or False: "no" and 0 would silently count as one of them."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={shown(value)}: True or False is needed.")


def check_text(name: str, value: Any) -> None:
    """Raise ConfigError unless `value` is text or a path."""
    if not isinstance(value, str | PathLike):
        raise ConfigError(f"{name}={shown(value)}: text, or nothing, is needed.")


def check_list(name: str, value: Any) -> None:
    """Raise ConfigError unless `value` is a list."""
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name}={shown(value)}: a list is needed.")


def check_mapping(name: str, value: Any) -> None:
    """Raise ConfigError unless `value` is a mapping."""
    if not isinstance(value, dict):
        raise ConfigError(f"{name}={shown(value)}: a mapping, or nothing, is needed.")


def check_names(name: str, value: Any) -> None:
    """Raise ConfigError unless `value` is None or a list of names.

    An empty name ends every path: PEFT would save every module whole, and the modules in it again.
    """
    if value is None:
        return
    if not isinstance(value, list | tuple | set | frozenset) or not all(isinstance(n, str) and n for n in value):
        raise ConfigError(f"{name}={shown(value)}: a list of names is needed, such as ['classifier'].")
    _check_length(name, value)


def check_pattern(name: str, value: Any) -> None:
    """Raise ConfigError unless `value` is None, a list of names, or a regular expression that can't take for ever."""
    if not isinstance(value, str):
        if value is not None and not isinstance(value, list | tuple | set | frozenset):
            raise ConfigError(f"{name}={shown(value)}: a list of names, or one regular expression, is needed.")
        check_names(name, value)
        return
    try:
        tree = _parser.parse(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{name}={shown(value)} is not a regular expression: {error}.") from error
    if _endless(tree) > MOST_REPEATS:
        raise ConfigError(
            f"{name}={shown(value)}: matching this can take for ever. A regular expression here has at most "
            f"{MOST_REPEATS} repeats without end (such as .* and \\w+) in a row, and no repeat or choice inside "
            "another such repeat. Say it with fewer, or as a list of names."
        )


def check_step(step: Any, total: Any) -> None:
    """Raise ConfigError unless `step` is one of a run's `total`, 0 to `total`; NumPy's whole numbers count, too."""
    whole = all(isinstance(number, Integral) and not isinstance(number, bool) for number in (step, total))
    if not whole or not 0 <= step <= total or total < 1:
        raise ConfigError(
            f"step {shown(step)} of {shown(total)}: whole numbers are needed, the steps that are done, from 0, and the "
            "run's total, above 0."
        )


def check_rows(name: str, value: Any) -> None:
    """Raise ConfigError unless `value` is None, a list of rows of an embedding, or such lists by the embedding's
    name."""
    lists = value if isinstance(value, dict) else {"": [] if value is None else value}
    fits = all(isinstance(key, str) for key in lists) and all(
        isinstance(rows, list | tuple) and all(is_whole(row, 0) for row in rows)
        for rows in (lists.values() if value is not None else ())
    )
    if not fits:
        raise ConfigError(
            f"{name}={shown(value)}: a list of rows of the embedding, numbers from 0, is needed; or such lists by the "
            "name of the embedding."
        )
    for rows in lists.values():
        _check_length(name, rows)


def check_layers(name: str, value: Any) -> None:
    """Raise ConfigError unless `value` is None, a layer's number, or a list of such."""
    numbers = [] if value is None else [value] if isinstance(value, int) else value
    whole = isinstance(numbers, list | tuple | set | range) and all(is_whole(n, -MOST_RANK, MOST_RANK) for n in numbers)
    if not whole:
        raise ConfigError(f"{name}={shown(value)}: a layer's number, counted from 0, or a list of such.")
    _check_length(name, numbers)


def _check_length(name: str, value: Any) -> None:
    if len(value) > MOST_ENTRIES:
        raise ConfigError(f"{name} has {len(value):,} entries; at most {MOST_ENTRIES:,}.")


def _endless(tree: Any) -> int:
    """The number of repeats without end in a row; one with a repeat or a choice inside counts as too many."""
    count = 0
    for opcode, argument in tree:
        if opcode in (op.MAX_REPEAT, op.MIN_REPEAT):
            _, most, body = argument
            inside = _endless(body)
            if most > MOST_RANK or most == op.MAXREPEAT:
                count += MOST_REPEATS + 1 if inside or _chooses(body) else 1
            else:
                count += inside * min(most, MOST_REPEATS + 1)
        elif opcode is op.BRANCH:
            count += max(map(_endless, argument[1]), default=0)
        elif opcode is op.SUBPATTERN:
            count += _endless(argument[-1])
        elif opcode in (op.ASSERT, op.ASSERT_NOT):
            count += _endless(argument[1])
        elif opcode is op.GROUPREF_EXISTS:
            count += max(_endless(part) for part in argument[1:] if part is not None)
        elif hasattr(op, "ATOMIC_GROUP") and opcode is op.ATOMIC_GROUP:
            count += _endless(argument)
    return count


def _chooses(tree: Any) -> bool:
    """Whether there is more than one way to match a text with `tree`: a choice or a repeat of any kind."""
    for opcode, argument in tree:
        if opcode in (op.BRANCH, op.MAX_REPEAT, op.MIN_REPEAT, op.GROUPREF_EXISTS):
            return True
        if opcode is op.SUBPATTERN and _chooses(argument[-1]):
            return True
    return False
