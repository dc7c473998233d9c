"""The allowed name nearest to a wrong one: for keys, columns, files, recipes."""

import difflib
from collections.abc import Iterable
from pathlib import Path


def nearest(wrong: str, allowed: Iterable[str], synonyms: dict[str, str] | None = None) -> str | None:
    """The member of `allowed` that `wrong` most likely meant, or None.

    A known synonym decides first, then equality but for case and for `-`, `_` and blanks, then the last dotted
    part (`lr` for `train.lr`), then a name that contains the other at a word's edge, then difflib's ratio >= 0.6.
    """
    names = list(allowed)
    plain = {_plain(name): name for name in reversed(names)}
    key = _plain(wrong)
    if synonyms:
        # "method.rank" finds the synonym "rank" too, so that a row serves every section.
        for candidate in (wrong, wrong.rsplit(".", 1)[-1]):
            target = synonyms.get(_plain(candidate))
            if target in names:
                return target
    if key in plain:
        return plain[key]
    last = _plain(wrong.rsplit(".", 1)[-1])
    same = {_plain(name): name for name in reversed(names) if _plain(name.rsplit(".", 1)[-1]) == last}
    if same:
        # With a section, however misspelt, the one of that name; else the first.
        near = difflib.get_close_matches(key, same, n=1, cutoff=0.0) if "." in wrong else []
        return same[near[0]] if near else next(reversed(same.values()))
    close = difflib.get_close_matches(key, plain, n=1, cutoff=0.75)
    if close:
        return plain[close[0]]
    for name in names:
        words = _plain(name).replace(".", "_").split("_")
        if len(last) > 2 and last in words:
            return name
    close = difflib.get_close_matches(key, plain, n=1, cutoff=0.6)
    return plain[close[0]] if close else None


def did_you_mean(wrong: str, allowed: Iterable[str], synonyms: dict[str, str] | None = None) -> str:
    """`, did you mean X?` or an empty string."""
    name = nearest(wrong, allowed, synonyms)
    return f", did you mean {name}?" if name is not None else ""


def missing_path(path: str | Path) -> str:
    """An error's text for a missing path: the deepest folder that exists, and the nearest names in it."""
    target = Path(path).expanduser()
    if target.exists():
        kind = "a folder" if target.is_dir() else "a file" if target.is_file() else "no regular file"
        return f"'{path}' is there, but it is {kind}"
    folder = target.parent
    missing = target.name
    while not folder.is_dir():
        missing = folder.name
        if folder == folder.parent:
            break
        folder = folder.parent
    where = "this folder" if folder == Path(".") else f"'{folder}'"
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        return f"'{path}' cannot be reached: {where}: {error.strerror or error}"
    if folder / missing != target:
        missing_text = f"'{path}' does not exist: {where} has no '{missing}'"
    else:
        missing_text = f"'{path}' does not exist"
    close = difflib.get_close_matches(missing, names, n=3, cutoff=0.5)
    if close:
        return f"{missing_text}; nearest in {where}: " + ", ".join(close)
    if not names:
        return f"{missing_text}; {where} is empty"
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"{missing_text}; {where} holds {shown}"


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def is_path(model: str) -> bool:
    """Whether a model's name can only be a path, also of Windows: names on the hub have at most one slash."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model or model[1:2] == ":"
