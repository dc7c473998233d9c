"""The Python in README.md and docs/ runs as written, offline.

A file's ```python blocks run in order in one interpreter, in an empty folder. Names of models on the hub stand for tiny
random ones there (`MODELS`). A block that can't run (it needs a GPU, or shows a fragment) is marked ```python no-run. A
block of any language that is marked with the name of a file (```python mine.py) is written to that file instead, and a
```bash run block has commands that run there, beside a small reviews.csv.
"""

import re
import shlex
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

# The tables of the training tests serve here too.
from training_tables import reviews, write_csv

from fresh import Fresh
from peft_suite.tiny_hub import BERT, GROUPED, furnish

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(?P<language>\w+)(?P<marks>[^\n]*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)

_BERT = {**BERT, "num_hidden_layers": 12, "hidden_size": 32}
#: What each model that a page names is here: a class of transformers, its config's class and fields.
MODELS = {
    "FacebookAI/roberta-base": ("RobertaForSequenceClassification", "RobertaConfig", _BERT),
    "microsoft/deberta-v3-base": ("DebertaV2ForSequenceClassification", "DebertaV2Config", _BERT),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "meta-llama/Llama-2-7b-hf": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
}


def runnable(page: Path) -> str:
    """The page's Python blocks as one program whose line numbers are the page's."""
    text = page.read_text(encoding="utf-8")
    lines: list[str] = []
    for block in BLOCK.finditer(text):
        if block["language"] == "python" and not block["marks"]:
            first = text[: block.start("code")].count("\n")
            lines += [""] * (first - len(lines))
            lines += block["code"].splitlines()
    return "\n".join(lines) + "\n"


def marked(page: Path) -> dict[str, str]:
    """Mark -> code of the page's blocks that are files or commands."""
    blocks = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return {mark: b["code"] for b in blocks if (mark := b["marks"].strip()) == "run" or "." in mark}


def lay_out(page: Path, folder: Path) -> Path:
    """A new `folder` with the files that the page names."""
    folder.mkdir()
    for name, code in marked(page).items():
        if name != "run":
            (folder / name).write_text(code, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("hub")
    furnish(cache, MODELS)
    return cache


@pytest.fixture(scope="module")
def fresh(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fresh]:
    offline = {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with closing(Fresh(tmp_path_factory.mktemp("pages"), **offline)) as programs:
        yield programs


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page).strip()], ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path, fresh: Fresh, tmp_path: Path) -> None:
    folder = lay_out(page, tmp_path / "folder")
    done = fresh.run(f"import sys; sys.path.insert(0, {str(folder)!r})\n" + runnable(page), folder=folder)
    assert done.returncode == 0, f"{page.name}: {done.stderr[-3000:]}"


@pytest.mark.parametrize("page", [page for page in PAGES if "run" in marked(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, fresh: Fresh, tmp_path: Path) -> None:
    folder = lay_out(page, tmp_path / "folder")
    write_csv(folder / "reviews.csv", reviews(48))
    commands = [shlex.split(line, comments=True) for line in marked(page)["run"].splitlines()]
    assert len(commands) >= 5
    for command in commands:
        assert command[0] == "ziggurat"
        done = fresh.run("from ziggurat.cli import main; main()", *command[1:], folder=folder)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[-3000:]}"


def test_the_pages_have_code_to_run() -> None:
    assert sum(bool(runnable(page).strip()) for page in PAGES) >= 1
    assert runnable(ROOT / "docs" / "msplora.md").count("MSPLoraConfig(") >= 5


def test_a_marked_block_does_not_run_and_lines_are_kept(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "text\n```python\na = 1\n```\n\n```python no-run\nfail()\n```\n```python\nb = a\n```\n```bash\nx\n```\n"
    )
    assert runnable(page) == "\n\na = 1\n\n\n\n\n\n\nb = a\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        goal = page.parent / path if path else page
        if not goal.exists() or (anchor and goal.suffix == ".md" and anchor not in anchors(goal)):
            broken.append(target)
    assert broken == []


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get: lower case, spaces as hyphens, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_reference_has_every_public_name() -> None:
    """A method's tuner is PEFT's affair: its config is the name that users take."""
    import ziggurat

    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = re.findall(r"^::: ziggurat\.(\w+)$", page, re.MULTILINE)
    public = {name for name in ziggurat.__all__ if not name.endswith("Model") and name != "__version__"}
    assert set(documented) == public
