"""The report in a real headless browser: no errors, nothing from elsewhere, every figure there, no text overflowing."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analysis_configs import CONFIGS
from typer.testing import CliRunner

from ziggurat import LoR2CConfig
from ziggurat.analysis import svg
from ziggurat.analysis.page import names_of, read_run, report
from ziggurat.cli import app
from ziggurat.errors import ConfigError, RecipeError

Saved = Callable[..., Path]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium")

#: Nothing of the browser's own on the network; no sandbox, since CI's user is root.
_QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
_QUIET += ["--disable-background-networking", "--disable-component-update"]

#: Runs inside the page: texts that leave their chart, what is wider than the page, which colours are in force.
_LOOK = """
const frame = document.getElementById('page'), page = frame.contentDocument, root = page.documentElement;
const out = [];
for (const chart of page.querySelectorAll('svg')) {
  const box = chart.getBoundingClientRect();
  for (const text of chart.querySelectorAll('text')) {
    const b = text.getBoundingClientRect();
    if (b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1)
      out.push(chart.getAttribute('aria-label') + ': ' + text.textContent);
  }
}
const wide = [...page.querySelectorAll('body *')].filter(one => !one.closest('.s, pre, svg')
  && one.getBoundingClientRect().right > root.clientWidth + 1).map(one => one.tagName + ' ' + one.className);
document.getElementById('found').textContent = JSON.stringify({out, wide, charts: page.querySelectorAll('svg').length,
  scroll: root.scrollWidth, width: root.clientWidth, paper: getComputedStyle(page.body).backgroundColor});
"""


def run_folder(folder: Path, name: str, *, spectra: bool = True) -> Path:
    """What `ziggurat train` leaves beside an adapter."""
    history: list[dict[str, Any]] = []
    for epoch in (1.0, 2.0, 3.0):
        history.append({"loss": 0.7 / epoch, "learning_rate": 1e-3 / epoch, "epoch": epoch - 0.5, "step": 1})
        history.append({"eval_loss": 0.6 / epoch, "eval_accuracy": 70 + 4 * epoch, "epoch": epoch, "step": 2})
        if spectra:
            values = {f"spectra/global/s{n}": epoch / n for n in range(1, 9)}
            history.append({**values, "spectra/global/effective_rank": 3.0 + epoch, "epoch": epoch, "step": 3})
    values = {
        "metric": "accuracy", "before": {"accuracy": 50.0}, "after": {"accuracy": 82.0, "loss": 0.2}, "guess": {},
        "parameters": {"adapter": 448, "head": 51, "lora": None, "total": 499}, "steps": 12, "seconds": 3.4,
        "peak_mb": None, "versions": {"ziggurat": "0.1.0"}, "history": history,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(values))
    (folder / "recipe.yaml").write_text(f"name: {name}\nabout: <b>not markup</b> & so on\n")
    return folder


def look(html: str, folder: Path, width: int, dark: bool = False) -> dict[str, Any]:
    """Load the page in a frame of `width` pixels (a window can't be narrower than about 500) and look at it."""
    assert BROWSER is not None
    frame = (
        f'<iframe id="page" style="width:{width}px;height:900px;border:0" srcdoc="{escape(html, quote=True)}"></iframe>'
    )
    script = f"<pre id=found></pre><script>onload=()=>{{{_LOOK}}}</script>"
    (folder / "look.html").write_text(f"<!doctype html><meta charset=utf-8>{frame}{script}", encoding="utf-8")
    command = [
        BROWSER,
        f"--user-data-dir={folder / 'profile'}",
        *_QUIET,
        "--enable-logging=stderr",
        "--hide-scrollbars",
    ]
    command += ["--virtual-time-budget=3000", "--window-size=1400,1000", "--dump-dom"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run([*command, (folder / "look.html").as_uri()], capture_output=True, text=True, timeout=120)
    output = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not output, output
    match = re.search(r"<pre id=\"found\">(.*?)</pre>", done.stdout, re.DOTALL)
    assert match is not None and match[1], done.stderr[-2000:]
    return json.loads(match[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


@pytest.fixture
def runs(saved: Saved) -> list[Path]:
    first = run_folder(saved(CONFIGS["msplora"](), "a-run-with-a-rather-long-name-of-its-own"), "one")
    second = run_folder(saved(CONFIGS["lor2c"](), "paths"), "two", spectra=False)
    (second / "lor2c_events.json").write_text(json.dumps([{"step": 4, "kind": "merge", "reason": "smallest sum"}]))
    return [first, second]


def pruned_run(saved: Saved) -> Path:
    """LoRA² with its ranks cut, and a role without any direction in one layer."""
    config = CONFIGS["lora2"]()
    paths = [f"bert.encoder.layer.{n}.attention.self.{role}" for n in range(4) for role in ("query", "value")]
    config.rank_pattern = dict(zip(paths, [4, 3, 2, 1, 0, 4, 1, 2], strict=True))
    return run_folder(saved(config, "pruned"), "pruned", spectra=False)


def test_what_was_pruned_is_told_and_drawn(saved: Saved) -> None:
    run = read_run(pruned_run(saved))
    assert run.most == 4 and sum(run.remaining.values()) == 17
    page = report([pruned_run(saved)])
    assert "17 of 32 directions remain, 15 were pruned." in page
    drawn = page[page.index("Remaining directions, of 4") :].split("</svg>")[0]
    shown = [int(word) for word in re.findall(r">(\d)</text>", drawn)]
    assert shown[-8:] == [4, 3, 2, 1, 0, 4, 1, 2]


def test_an_unpruned_run_says_nothing_of_pruning(saved: Saved) -> None:
    assert "were pruned" not in report([run_folder(saved(CONFIGS["lora2"]()), "whole")])


def test_two_runs_of_one_depth_are_compared(saved: Saved) -> None:
    first, other = (run_folder(saved(CONFIGS[name](), name), name) for name in ("msplora", "lora"))
    page = report([first, other])
    assert "minus that of lora" in page and "minus that of" not in report([first])


def test_runs_stand_side_by_side_until_they_are_many(runs: list[Path], tmp_path: Path) -> None:
    again = [Path(shutil.copytree(run, tmp_path / "again" / run.name)) for run in runs]
    few, many = report(runs), report([*runs, *again])
    assert "<th>run</th><th>a-run-with" in few and "<th>run</th><th>metric</th>" in many


def test_one_point_is_no_curve(saved: Saved) -> None:
    folder = run_folder(saved(CONFIGS["lora"]()), "short")
    values = json.loads((folder / "run.json").read_text())
    values["history"] = values["history"][:3]
    (folder / "run.json").write_text(json.dumps(values))
    page = report([folder])
    assert "Training loss" not in page and "Singular values of part" not in page


@in_browser
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_overflows_on_a_phone_or_a_desk(width: int, runs: list[Path], tmp_path: Path) -> None:
    shown = look(report(runs), tmp_path, width)
    assert shown["width"] == width
    assert (shown["out"], shown["wide"]) == ([], [])
    assert shown["scroll"] <= width
    # 4 curves; a pyramid, two role maps and a KL map a run; the first's tiers, energy, spectra and ranks; one compared.
    assert shown["charts"] == 4 + 2 * 4 + 4 + 1


@in_browser
def test_it_follows_light_and_dark(runs: list[Path], tmp_path: Path) -> None:
    page = report(runs[:1])
    assert look(page, tmp_path, 800)["paper"] == "rgb(255, 255, 255)"
    assert look(page, tmp_path, 800, dark=True)["paper"] == "rgb(18, 22, 27)"


def test_the_page_needs_nothing_from_elsewhere(runs: list[Path]) -> None:
    page = report(runs)
    assert not re.search(r"https?://|<script|@import|url\(|<link(?![^>]*data:,)|<img", page)


def test_the_page_says_what_the_run_says(runs: list[Path]) -> None:
    page = report(runs)
    for words in ("82.00", "448", "smallest sum", "ziggurat 0.1.0", "&lt;b&gt;not markup&lt;/b&gt; &amp; so on"):
        assert words in page, words
    assert "<b>not markup" not in page


def test_a_run_without_a_readable_adapter_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    assert "is no adapter" in report([run_folder(folder, "full")])


def test_bad_folders_are_refused(tmp_path: Path, saved: Saved) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        read_run(tmp_path / "nowhere")
    adapter = saved(CONFIGS["lora"](), "plain")
    with pytest.raises(RecipeError, match=r"was not written by `ziggurat train` .it has no run\.json"):
        read_run(adapter)
    run_folder(adapter, "plain")
    with pytest.raises(RecipeError, match=r"its folders that are: plain"):
        read_run(tmp_path)
    (adapter / "run.json").write_text("{")
    with pytest.raises(RecipeError, match="is no JSON"):
        read_run(adapter)
    (adapter / "run.json").write_text('{"before": {}}')
    with pytest.raises(RecipeError, match="unfinished run"):
        read_run(adapter)


def test_the_command_writes_the_file(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "page.html"
    done = CliRunner().invoke(app, ["report", str(runs[0]), "--out", str(out)])
    assert done.exit_code == 0 and out.read_text().startswith("<!doctype html>")


def test_charts_bear_what_is_not_there() -> None:
    assert svg.line_chart("empty", {"a": ([1.0], [float("nan")])}, "epoch") == ""
    assert "<polyline" in svg.line_chart("one point", {"a": ([1.0], [2.0])}, "epoch")
    assert svg.heat_map("NaN", np.full((2, 2), np.nan), ["0", "1"], ["q", "v"]).count('class="x"') == 4


def test_ticks_are_round_and_reach_over_all() -> None:
    assert svg.ticks(0.669, 0.707, 4) == [0.66, 0.67, 0.68, 0.69, 0.7, 0.71]
    assert svg.ticks(0, 10, 4) == [0, 5, 10] and svg.ticks(3, 3, 4) == [3]
    assert svg.ticks(-1.2e-5, 2e-5, 4)[0] <= -1.2e-5


def test_bars_show_shares_of_each_row() -> None:
    drawn = svg.bars("energy", {"global": {"q": 1.0, "v": 0.0}, "layer": {"q": 3.0, "v": 2.0}}, "x")
    assert re.findall(r">(\d+%)<", drawn) == ["25%", "75%", "100%"]
    wide = [float(w) for w in re.findall(r'width="([\d.]+)" height="22"', drawn)]
    assert wide[1] + 1 == pytest.approx(3 * (wide[0] + 1), rel=1e-2) and wide[2] == 0
    assert svg.bars("zeros", {"lora": {"q": 0.0}}, "x") == "" == svg.bars("none", {}, "x")


def test_two_hues_meet_at_zero() -> None:
    drawn = svg.heat_map("d", np.array([[-2.0, 0.0], [1.0, np.nan]]), ["0", "1"], ["0", "1"], centred=True)
    cells = re.findall(r'class="([hiyx])"(?: style="--v:(\d+)%")? x', drawn)
    assert cells == [("y", "100"), ("h", "0"), ("h", "100"), ("x", "")]


def test_a_deep_narrow_map_has_names_that_do_not_collide() -> None:
    layers = [str(n) for n in range(80)]
    drawn = svg.heat_map("KL", np.random.default_rng(0).random((80, 80)), layers, layers, "layer")
    across = [float(x) for x in re.findall(r'<text class="n m" x="([\d.]+)" y="[\d.]+">\d+</text>', drawn)]
    assert all(b - a > 14 for a, b in pairwise(across))


def test_structure_of_spans_is_drawn(saved: Saved) -> None:
    config = LoR2CConfig(r=4, spans=[[0, 1], [2, 3]], init_weights=False)
    page = report([run_folder(saved(config), "spans")])
    assert page.count("<svg") >= 4


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / seed / "run" for seed in ("seed1", "seed2")] + [tmp_path / "seed1" / "other"]
    assert names_of(folders) == ["seed1/run", "seed2/run", "other"]
    with pytest.raises(ConfigError, match="is named twice"):
        names_of([folders[0], tmp_path / "seed1" / "." / "run"])


def test_two_runs_of_one_name_draw_two_curves(saved: Saved, tmp_path: Path) -> None:
    source = run_folder(saved(CONFIGS["lora"](), "run"), "run", spectra=False)
    for seed in ("seed1", "seed2"):
        shutil.copytree(source, tmp_path / seed / "run")
    page = report([tmp_path / "seed1" / "run", tmp_path / "seed2" / "run"])
    (loss,) = re.findall(r"<svg(?:(?!</svg>).)*Training loss.*?</svg>", page, re.DOTALL)
    assert "seed1/run" in loss and "seed2/run" in loss and loss.count("<polyline") + loss.count("<path") >= 2
