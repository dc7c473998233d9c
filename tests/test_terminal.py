"""Texts from files reach the terminal as text and never as a command."""

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text
from training_tables import reviews, save_tiny_bert, tiny_recipe, write_csv

from commands import main
from ziggurat.terminal import Console, clean
from ziggurat.training.loop.run import train

CLEAR = "\x1b[2J\x1b]0;owned\x07\x9b31m\r"


def test_control_characters_are_spelt_out_and_the_rest_stays() -> None:
    assert clean(f"a{CLEAR}b") == "a\\u001b[2J\\u001b]0;owned\\u0007\\u009b31m\\u000db"
    kept = "d\u00e9j\u00e0 vu\t\u4f4e\n\u2028 \u200fend"
    assert clean(kept) == kept
    assert json.loads(clean(json.dumps(CLEAR, ensure_ascii=False))) == CLEAR


def test_the_console_keeps_its_own_colours() -> None:
    out = StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=200, highlight=False)
    table = Table(title=Text(CLEAR))
    table.add_column(Text(CLEAR))
    table.add_row(Text(f"a{CLEAR}", style="red"))
    console.print(table)
    console.print(f"note: {CLEAR}", style="dim", markup=False)
    shown = out.getvalue()
    assert "\x1b[31ma\\u001b[2J" in shown and "\x1b[2mnote" in shown
    assert not any(bad in shown for bad in ("\x1b[2J", "\x1b]", "\x07", "\x9b", "\r"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose classes are called by terminal commands."""
    folder = tmp_path_factory.mktemp("hostile")
    save_tiny_bert(folder / "model")
    rows = [{**row, "label": CLEAR + row["label"]} for row in reviews(16)]
    data = write_csv(folder / "data.csv", rows)
    return train(tiny_recipe(folder / "model", data, folder / "run", train__max_steps=1)).folder


def test_no_command_passes_on_what_a_file_says(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "run")
    bad = tmp_path / "bad.yaml"
    bad.write_text(json.dumps({"model": CLEAR, "data.train": CLEAR, CLEAR: 1, "method.name": CLEAR}))
    table = tmp_path / "table.yaml"
    table.write_text(json.dumps({"methods": {CLEAR: {"method.name": "lora"}}, "tasks": [CLEAR], "seeds": [1]}))
    config = tmp_path / "run" / "adapter_config.json"
    for words in (
        ("predict", str(run), "the film is good"),
        ("predict", str(run), "the film is good", "--json"),
        ("doctor", str(bad)),
        ("train", str(bad)),
        ("compare", str(table)),
    ):
        main(*words)
        printed = "".join(capsys.readouterr())
        assert "\\u001b" in printed, words
        assert not any(bad in printed for bad in ("\x1b", "\x07", "\x9b", "\r")), words
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": CLEAR}))
    for command in ("analyze", "export", "merge"):
        out = () if command == "analyze" else (str(tmp_path / command),)
        main(command, str(tmp_path / "run"), *out)
        printed = "".join(capsys.readouterr())
        assert not any(bad in printed for bad in ("\x1b", "\x07", "\x9b", "\r")), command


def test_a_report_replaces_only_a_report(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    page.write_text("<html>mine</html>")
    assert main("report", str(run), "--out", str(page)) == 2
    assert "exists and is no report of this command; name another file by --out" in capsys.readouterr().err
    assert page.read_text() == "<html>mine</html>"
    page.unlink()
    assert main("report", str(run), "--out", str(page)) == main("report", str(run), "--out", str(page)) == 0
