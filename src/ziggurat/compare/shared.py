"""Method fields that `set` or a task gives to all methods: each method takes those that it has."""

from collections.abc import Iterator

from ziggurat.nearest import did_you_mean
from ziggurat.recipe.methods import BUDGET, METHODS, SYNONYMS, method_fields

from .evaluated import NONE

#: Fields with another meaning in a method, or none: bottleneck adapters target the linear layers of the feed-forward
#: part, and have no scale.
_OTHER_MEANING = {"adapter": {"target_modules", "lora_alpha", "use_rslora"}}


class Shared:
    """Gives fields to the methods that have them, and records which methods took which."""

    def __init__(self) -> None:
        self._takers: dict[str, list[str]] = {}
        self._others: dict[str, list[str]] = {}
        self._fields: set[str] = set()

    def part(self, label: str, method_keys: dict[str, object], keys: dict[str, object]) -> dict[str, object]:
        """`keys` without the `method.*` keys that the method with the keys `method_keys` can't take."""
        taken = {}
        for key, value in keys.items():
            section, _, name = key.partition(".")
            if section != "method":
                taken[key] = value
                continue
            fits = self._fits(method_keys, name)
            if fits:
                taken[key] = value
            if method_keys.get("method.name") != NONE:  # it has no fields, and needs no note
                place = (self._takers if fits else self._others).setdefault(key, [])
                if label not in place:
                    place.append(label)
        return taken

    def _fits(self, method_keys: dict[str, object], name: str) -> bool:
        method = METHODS.get(str(method_keys.get("method.name")))
        if method is None:
            return False
        self._fields |= set(fields := method_fields(str(method_keys["method.name"])))
        ranks = set(method.ranks(8)) if method.ranks is not None else set()
        if name == BUDGET:
            return bool(ranks) and not any(f"method.{rank}" in method_keys for rank in ranks)
        if name in _OTHER_MEANING.get(str(method_keys["method.name"]), ()):
            return False
        # A method with its own budget gets its rank from it.
        return name in fields and not (name in ranks and f"method.{BUDGET}" in method_keys)

    def notes(self) -> Iterator[str]:
        for key, labels in self._others.items():
            why = "no such field there, or of another meaning, or it has its own rank"
            yield f"{key}, given to all, is not for {', '.join(labels)}: {why}"

    def problems(self) -> Iterator[str]:
        """Keys that no method took, which are mistakes."""
        names = [f"method.{name}" for name in (*sorted(self._fields), BUDGET)]
        for key in self._others:
            if key not in self._takers:
                yield f"{key}: no method of this table takes it{did_you_mean(key, names, SYNONYMS)}"
