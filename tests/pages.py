"""The pages of docs/ that are written from tables: `PYTHONPATH=tests python -m pages` writes them anew."""

from pathlib import Path

from ziggurat.doctor.facts import FACTS, METHODS
from ziggurat.recipe.names import PROGRAMS, tables

DOCS = Path(__file__).parents[1] / "docs"
#: The sections of combinations.yaml -> their titles.
SECTIONS = {
    "base": "Base weights",
    "train": "Training",
    "distributed": "Several processes",
    "machine": "Where it runs",
    "use": "Using and serving",
}


def written_into(page: str, begin: str, table: str, end: str) -> str:
    """The page with the table between these two marks."""
    head, _, rest = page.partition(begin)
    return f"{head}{begin}{table}{end}{rest.partition(end)[2]}"


def combinations() -> str:
    """The first table of docs/combinations.md."""
    lines = []
    for section, title in SECTIONS.items():
        names = " | ".join(METHODS.values())
        lines += [f"| {title} | {names} | notes |", "|---|" + "---|" * (len(METHODS) + 1)]
        for row in FACTS:
            if row.section == section:
                cells = " | ".join(row.cells[method] for method in METHODS)
                reasons = {
                    "": (row.why, row.instead),
                    **{f"{METHODS[name]}: ": text for name, text in row.apart.items()},
                }
                about = ". ".join(
                    whose + "; otherwise: ".join(part for part in parts if part) for whose, parts in reasons.items()
                )
                lines.append(f"| {row.what} | {cells} | {about} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def names() -> str:
    """docs/names.md."""
    lines = [
        "# Names from elsewhere",
        "",
        "Keys of other programs' recipes, and the key with the same meaning here. `ziggurat train` answers each",
        "of these names so, and says of the other options of these programs that no key stands for them. Columns of",
        "data have a table of their own in [recipes.md](recipes.md#instructions-chats-and-plain-text).",
    ]
    for program, title in PROGRAMS.items():
        lines += ["", f"## {title}", "", "| there | here |", "|---|---|"]
        lines += [f"| `{name}` | {_shown(ours)} |" for name, ours in tables()[program].items() if ours]
    return "\n".join(lines) + "\n"


def _shown(ours: str) -> str:
    return f"`{ours}`" if " " not in ours or (": " in ours and ours.count(" ") == 1) else ours


def pages() -> dict[Path, str]:
    """Each page as its tables make it."""
    from contracts import like_lora

    path = DOCS / "combinations.md"
    page = written_into(path.read_text(encoding="utf-8"), "<!-- table -->\n", combinations(), "<!-- end -->")
    return {path: like_lora.written_into(page), DOCS / "names.md": names()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
