"""Rows of PEFT's parametrised tests, rewritten from a template method to one of ours."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from peft import PeftConfig

#: Fields of a template that a config *instance* in a row keeps.
KEPT = ("task_type", "target_modules", "r", "modules_to_save")
#: The one of PEFT's toy models that every method is tested on.
TOY = "MLP"


@dataclasses.dataclass(frozen=True)
class Rewriter:
    """Turns rows for `templates` into rows for `config`.

    `rename`: fields of a template -> ours. `without`: fields that are not passed on. `variants`: fields that the first
    row on the toy model `TOY` gets in further copies of it. `not_on`: toy models whose rows are left out.
    """

    config: type[PeftConfig]
    templates: tuple[type[PeftConfig], ...]
    rename: dict[str, str]
    without: tuple[str, ...] = ()
    variants: tuple[dict[str, Any], ...] = ()
    not_on: tuple[str, ...] = ()

    def rows(self, rows: Sequence[Any], ids: Sequence[Any] | None) -> tuple[list[Any], list[Any] | None] | None:
        """Rows and their ids for our config; None if no config is in any row. Rows that become equal are kept once."""
        values = [tuple(row.values) if _is_param(row) else row for row in rows]
        if not any(_is_config(part) for row in values for part in parts(row)):
            return None
        new, new_ids, seen = [], [], set()
        for number, (row, value) in enumerate(zip(rows, values, strict=True)):
            if not any(self._is_template(part) for part in parts(value)):
                continue
            model = next((part for part in parts(value) if isinstance(part, str) and "/" in part), "")
            if any(part in self.not_on for part in parts(value) if isinstance(part, str)):
                continue
            for variant in ({}, *self.variants) if TOY in parts(value) and not seen else ({},):
                ours = self._ours(value, variant)
                key = repr([part for part in parts(ours) if not isinstance(part, str | tuple | list)])
                names = [part for part in parts(ours) if isinstance(part, str) and part.isidentifier()]
                if (model, *names, key) in seen:
                    continue
                seen.add((model, *names, key))
                new.append(pytest.param(*ours, marks=row.marks, id=row.id) if _is_param(row) else ours)
                new_ids.append(ids[number] if ids else None)
        return new, new_ids if ids else None

    def _is_template(self, part: Any) -> bool:
        return (part if isinstance(part, type) else type(part)) in self.templates

    def _ours(self, value: Any, variant: dict[str, Any]) -> Any:
        if self._is_template(value):
            if isinstance(value, type):
                return self.config
            kept = {name: getattr(value, name, None) for name in KEPT}
            return self.config(**self._fields({name: given for name, given in kept.items() if given is not None}))
        if isinstance(value, dict):
            return self._fields(value) | variant
        return tuple(self._ours(part, variant) for part in value) if isinstance(value, tuple) else value

    def _fields(self, given: dict[str, Any]) -> dict[str, Any]:
        known = {field.name for field in dataclasses.fields(self.config) if field.init} - {"peft_type", *self.without}
        renamed = {self.rename.get(name, name): value for name, value in given.items()}
        return {name: value for name, value in renamed.items() if name in known}

    def function(self, function: Callable[..., Any]) -> None:
        """Rewrite the parametrize marks of a test (or of a class of tests), once."""
        if getattr(function, "_rewritten", None) is self or not hasattr(function, "pytestmark"):
            return
        marks = function.pytestmark if isinstance(function.pytestmark, list) else [function.pytestmark]
        function.pytestmark = [self._mark(mark) for mark in marks]  # type: ignore[attr-defined]
        function._rewritten = self  # type: ignore[attr-defined]

    def _mark(self, mark: Any) -> Any:
        if mark.name != "parametrize":
            return mark
        ids = mark.kwargs.get("ids")
        rows = self.rows(list(mark.args[1]), None if callable(ids) or ids is None else list(ids))
        if rows is None:
            return mark
        kwargs = {name: value for name, value in mark.kwargs.items() if name != "ids"}
        if rows[1] is not None or callable(ids):
            kwargs["ids"] = ids if callable(ids) else rows[1]
        return pytest.mark.parametrize(mark.args[0], rows[0], **kwargs).mark


def parts(value: Any) -> Iterator[Any]:
    """`value` and everything inside its tuples and lists."""
    yield value
    if isinstance(value, tuple | list):
        for part in value:
            yield from parts(part)


def _is_param(row: Any) -> bool:
    return hasattr(row, "values") and hasattr(row, "marks")


def _is_config(part: Any) -> bool:
    return isinstance(part, PeftConfig) or (isinstance(part, type) and issubclass(part, PeftConfig))
