"""The command, its files and its figures, on real adapters and on bad ones."""

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analysis_configs import CONFIGS
from peft import LoraConfig, PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ziggurat.analysis import collect, figures, measures, tiers
from ziggurat.analysis.components import short_roles, span_text
from ziggurat.analysis.style import digits_for, heat_map, new_axes
from ziggurat.analysis.trace import top_values
from ziggurat.analysis.write import MAPS, against, as_json, pictures_of, table, write
from ziggurat.cli import app
from ziggurat.errors import ConfigError

Saved = Callable[..., Path]


def text_of(shown: Any) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(shown)
    return " ".join(console.export_text().split())


def test_the_command_writes_tables_and_figures(saved: Saved, tmp_path: Path) -> None:
    first, other = saved(CONFIGS["msplora"](), "mine"), saved(CONFIGS["lora"](), "theirs")
    done = CliRunner().invoke(app, ["analyze", str(first), "--against", str(other), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "mine (msplora)" in done.output and "theirs (lora)" in done.output
    assert "KL between layers, mine minus theirs" in done.output
    with (tmp_path / "out" / "components.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * (1 + 3 + 4 + 4)
    rows = measures.rows(collect(first))
    assert [float(line["effective_rank"]) for line in lines] == [row["effective_rank"] for row in rows]
    content = json.loads((tmp_path / "out" / "analysis.json").read_text())
    difference = np.array(content["stacks"]["bert.encoder.layer"]["kl_difference"])
    np.testing.assert_allclose(difference, measures.kl_difference(collect(first), collect(other)), atol=1e-12)
    drawn = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert drawn == {"pyramid", "energy", "effective_rank", "norm", "spectra", "tiers", "kl_difference", *MAPS}


def test_a_recipe_takes_no_options_of_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("task: classification\n")
    for words, named in ((["--out", "x"], "--out"), (["-k", "2", "--beside", "y"], "--beside, -k")):
        done = CliRunner().invoke(app, ["analyze", str(tmp_path / "a.yaml"), *words])
        assert done.exit_code == 2 and f"{named}: for an adapter only" in done.output


def test_adapters_of_two_base_models_are_told(saved: Saved) -> None:
    first, other = saved(CONFIGS["msplora"](), "mine"), saved(CONFIGS["lora"](), "theirs")
    config = other / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "another"}))
    for option in ("--against", "--beside"):
        done = CliRunner().invoke(app, ["analyze", str(first), option, str(other)])
        assert done.exit_code == 0 and "theirs on another: unless that is one model" in " ".join(done.output.split())
    assert "unless that is" not in CliRunner().invoke(app, ["analyze", str(first), "--against", str(first)]).output


def test_names_of_a_strangers_adapter_are_no_formulas(saved: Saved, tmp_path: Path) -> None:
    folder = saved(CONFIGS["lora"]())
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {name: name.replace("bert.encoder.layer", "=HYPERLINK(1)") for name in tensors}
    renamed = {names[name].replace("attention", "@SUM"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    done = CliRunner().invoke(app, ["analyze", str(folder), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    with (tmp_path / "out" / "components.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["stack"] for row in rows} == {"'=HYPERLINK(1)"}
    assert {row["role"][:5] for row in rows} == {"'@SUM"}


def test_how_alike_the_tiers_are_is_told_in_numbers(saved: Saved, tmp_path: Path) -> None:
    folder = saved(CONFIGS["msplora"]())
    collected = collect(folder)
    lines = tiers.rows(collected)
    assert [(line["part"], line["other"]) for line in lines] == [
        ("global", "mid"),
        ("global", "layer"),
        ("mid", "layer"),
    ]
    overlaps, parts = measures.tier_overlap(collected)
    for line in lines:
        i, j = parts.index(line["part"]), parts.index(line["other"])
        assert line["overlap_input"] == pytest.approx(overlaps[i, j])
    # By their definitions, from the dense updates of one pair of components.
    a = collected.of("global")[0]
    b = next(c for c in collected.of("layer") if c.role == a.role)
    updates = [(c.B @ c.A).double().numpy() for c in (a, b)]
    expected = (updates[0] * updates[1]).sum() / np.prod([np.linalg.norm(u) for u in updates])
    assert measures.cosine(a, b) == pytest.approx(expected, abs=1e-6)
    for side, number in (("input", 1), ("output", 0)):
        bases = [np.linalg.qr(c.A.double().numpy().T if number else c.B.double().numpy())[0] for c in (a, b)]
        angle = np.degrees(np.arccos(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)[0]))
        assert tiers.smallest_angle(a, b, side) == pytest.approx(angle, abs=1e-3)
    assert tiers.smallest_angle(a, a) == pytest.approx(0.0, abs=0.1)
    write(collected, tmp_path / "out", pictures=False)
    with (tmp_path / "out" / "tiers.csv").open() as file:
        assert [float(line["cosine"]) for line in csv.DictReader(file)] == [line["cosine"] for line in lines]
    assert json.loads((tmp_path / "out" / "analysis.json").read_text())["tiers"] == lines
    assert "global and mid: cosine" in text_of(table(collected))
    assert not tiers.rows(collect(saved(CONFIGS["lora2"](), "planes")))


def test_an_adapter_against_itself_says_neither(saved: Saved) -> None:
    collected = collect(saved(CONFIGS["msplora"]()))
    assert "mean +0.0000" in against(collected, collected) and "both repeat themselves equally" in against(
        collected, collected
    )


def test_json_is_all_there_is_on_the_output(saved: Saved) -> None:
    done = CliRunner().invoke(app, ["analyze", str(saved(CONFIGS["lora2"]())), "--json", "-k", "2"])
    content = json.loads(done.stdout)
    assert content["method"] == "lora2" and {line["m_eff_k"] for line in content["components"]} == {2}


@pytest.mark.parametrize("method", CONFIGS)
def test_every_figure_is_drawn_and_named(method: str, saved: Saved) -> None:
    collected = collect(saved(CONFIGS[method]()))
    for name, draw in pictures_of(collected):
        ax = draw()
        assert ax.get_title(loc="left") or ax.get_title(), name
        assert all(label.get_text() for label in ax.get_yticklabels()), name
        ax.figure.draw_without_rendering()


def test_axes_come_in_and_go_out(saved: Saved) -> None:
    collected = collect(saved(CONFIGS["msplora"]()))
    ax = new_axes(4, 3)
    assert figures.pyramid(collected, ax=ax) is ax
    boxes = list(ax.patches)
    assert len(boxes) == 1 + 3 + 4
    assert [label.get_text() for label in ax.get_yticklabels()] == ["global\nrank 4", "mid\nrank 2", "layer\nrank 1"]


def test_a_heat_map_says_its_numbers_and_greys_what_is_missing() -> None:
    ax = heat_map(new_axes(4, 3), np.array([[1.0, np.nan], [2.5, 3.0]]), ["0", "1"], ["q", "v"])
    assert sorted(text.get_text() for text in ax.texts) == ["1.00", "2.50", "3.00"]
    assert [digits_for(np.array(v)) for v in ([0.004], [-0.2, 1.0], [12.0], [340.0], [])] == [3, 2, 1, 0, 2]
    close = heat_map(new_axes(4, 3), np.array([[-0.0001, 0.004]]), ["0"], ["q", "v"], centred=True)
    assert [text.get_text() for text in close.texts] == ["0.000", "0.004"]
    assert ax.images[0].get_array().mask.tolist() == [[False, True], [False, False]]


def test_fig_3_has_epochs_across_and_values_down() -> None:
    ax = figures.spectra_over_epochs(np.arange(6.0).reshape(3, 2), [1, 2], "global")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1", "2", "3"]
    assert ax.get_title(loc="left") == "The global tier" or ax.get_title() == "The global tier"


def test_zeros_and_nan_pass_through_to_every_output(saved: Saved, adapted: Callable[[Any], PeftModel]) -> None:
    fresh = collect(saved(LoraConfig(r=4, target_modules=["query"])))
    assert "B was never trained" in text_of(table(fresh))
    model = adapted(CONFIGS["msplora"]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "query" in name and ":B_" in name:
                parameter.fill_(math.nan)
    broken = collect(model)
    assert "NaN" in text_of(table(broken)) and "diverged" in text_of(table(broken))
    for collected in (fresh, broken):
        assert as_json(collected)["notes"]
        for _, draw in pictures_of(collected):
            draw().figure.draw_without_rendering()


def test_zeros_are_null_in_the_file_where_they_have_no_number(saved: Saved, tmp_path: Path) -> None:
    write(collect(saved(LoraConfig(r=4, target_modules=["query"]))), tmp_path / "out", pictures=False)
    content = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert content["stacks"]["bert.encoder.layer"]["kl"] == [[None] * 4] * 4
    assert not list((tmp_path / "out").glob("*.png"))


def test_one_layer_has_no_pairs_of_layers(saved: Saved) -> None:
    config = LoraConfig(
        r=2, target_modules=["query"], layers_to_transform=[0], layers_pattern="layer", init_lora_weights=False
    )
    collected = collect(saved(config))
    assert not {name for name, _ in pictures_of(collected)} & {"kl", "cosine"}
    assert against(collected, collected) == "There are no two layers with spectra to compare."


def test_bad_input_is_one_clean_error(tmp_path: Path, saved: Saved) -> None:
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(app, ["analyze", str(tmp_path / "empty")])
    assert isinstance(done.exception, ConfigError) and "is no adapter" in str(done.exception)
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["analyze", str(tmp_path / "file")])
    assert isinstance(done.exception, ConfigError) and "is a file; an adapter is a folder" in str(done.exception)
    with pytest.raises(ConfigError, match="is a file: name a folder"):
        write(collect(saved(CONFIGS["lora"]())), tmp_path / "file", pictures=False)


def test_words() -> None:
    roles = ["attention.self.query", "attention.output.dense", "output.dense", ""]
    assert list(short_roles(roles).values()) == ["query", "attention.output.dense", "output.dense", "layer"]
    assert [span_text(n) for n in ([], [3], [0, 1, 2], [0, 2])] == ["no layer", "layer 3", "layers 0-2", "layers 0, 2"]


def test_spectra_that_a_run_recorded_are_drawn(saved: Saved, tmp_path: Path) -> None:
    folder = saved(CONFIGS["msplora"]())
    history = [
        {f"spectra/{part}/s{n}": e / n for part, most in (("global", 4), ("mid", 2)) for n in range(1, most + 1)}
        | {"epoch": e}
        for e in (1.0, 2.0)
    ]
    (folder / "run.json").write_text(json.dumps({"history": history}))
    done = CliRunner().invoke(app, ["analyze", str(folder), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0 and (tmp_path / "out" / "epochs.png").is_file()
    whole, mid = figures.figure_3(top_values(history))
    # One scale for all tiers, cells of one height, and one colour bar.
    assert {ax.images[0].norm.vmax for ax in (whole, mid)} == {2.0}
    assert whole.get_ylim() == mid.get_ylim() == (3.5, -0.5) and len(whole.figure.axes) == 3
    whole.figure.draw_without_rendering()


def test_what_is_near_nothing_looks_like_nothing(saved: Saved) -> None:
    """Cosines of independent updates are noise; a scale that ended at the largest would paint it as structure."""
    ax = figures.layer_map(np.array([[1.0, 0.003], [-0.002, 1.0]]), "t", "l", centred=True, diagonal=False, least=0.1)
    assert ax.images[0].get_clim() == (-0.1, 0.1)
    assert ax.images[0].get_array().mask.tolist() == [[True, False], [False, True]]
