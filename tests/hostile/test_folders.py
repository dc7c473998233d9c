"""Adapter folders from anybody: nothing in them runs, nothing outside of them is read, damage is named."""

import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from typer.testing import CliRunner

from methods_table import zoo_config
from ziggurat import MSPLoraConfig
from ziggurat.analysis.collect import collect
from ziggurat.cli import app
from ziggurat.errors import ConfigError, RecipeError, ZigguratError
from ziggurat.export import export, merge
from ziggurat.files.untrusted import own_file
from ziggurat.host.saved.folder import adapter_config, load_adapter, load_base, tensor_shapes
from ziggurat.training.answers.load import load_adapter_model
from zoo import ZOO

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


class Bomb:
    """A pickle of it writes `marker` when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    ZOO["bert"].build().save_pretrained(str(folder))
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(str(base))
    folder = tmp_path / "adapter"
    get_peft_model(model, zoo_config("msplora", "bert", init_weights=False)).save_pretrained(str(folder))
    return folder


READERS: dict[str, Callable[[Path, Path], Any]] = {
    "adapter_config": lambda folder, out: adapter_config(folder),
    "from_pretrained": lambda folder, out: MSPLoraConfig.from_pretrained(str(folder)),
    "PeftModel": lambda folder, out: PeftModel.from_pretrained(ZOO["bert"].build(), str(folder)),
    "load": lambda folder, out: load_adapter(folder, load_base(folder)),
    "export": lambda folder, out: export(folder, out),
    "merge": lambda folder, out: merge(folder, out),
    "collect": lambda folder, out: collect(folder),
}
every_reader = pytest.mark.parametrize("reader", READERS)


@every_reader
def test_a_pickle_is_not_opened(reader: str, adapter: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (adapter / WEIGHTS).unlink()
    (adapter / PICKLE).write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(ConfigError, match=r"adapter_model\.bin, a pickle"):
        READERS[reader](adapter, tmp_path / "out")
    assert not marker.exists()


@every_reader
def test_a_pickle_under_another_name(reader: str, adapter: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for content in (pickle.dumps(Bomb(marker)), b"", b"\x80", struct.pack("<Q", 2**60), struct.pack("<Q", 4) + b"null"):
        (adapter / WEIGHTS).write_bytes(content)
        if reader == "adapter_config":
            with pytest.raises(ConfigError, match="can't be read as safetensors"):
                tensor_shapes(adapter)
        else:
            with pytest.raises(ConfigError, match="can't be read as safetensors"):
                READERS[reader](adapter, tmp_path / "out")
    assert not marker.exists()


@pytest.mark.parametrize("command", ["export", "merge", "analyze", "eval", "predict"])
def test_the_commands_refuse_a_pickle_in_one_line(command: str, adapter: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (adapter / WEIGHTS).unlink()
    (adapter / PICKLE).write_bytes(pickle.dumps(Bomb(marker)))
    more = {"export": [str(tmp_path / "out")], "merge": [str(tmp_path / "out")], "predict": ["text"]}
    done = CliRunner().invoke(app, [command, str(adapter), *more.get(command, [])])
    assert done.exit_code != 0
    assert isinstance(done.exception, ZigguratError | SystemExit)
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


@settings(max_examples=40, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_a_weights_file_cut_or_changed_anywhere(adapter: Path, data: st.DataObject) -> None:
    """Cut: refused. A byte changed in the header: refused, or read as what it now says, and then it must fit."""
    whole = (adapter / WEIGHTS).read_bytes()
    try:
        if data.draw(st.booleans()):
            (adapter / WEIGHTS).write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
            with pytest.raises(ConfigError, match="can't be read as safetensors"):
                MSPLoraConfig.from_pretrained(str(adapter))
            return
        (length,) = struct.unpack("<Q", whole[:8])
        place = data.draw(st.integers(0, 8 + length - 1))
        changed = bytearray(whole)
        changed[place] = data.draw(st.integers(0, 255))
        (adapter / WEIGHTS).write_bytes(bytes(changed))
        try:
            PeftModel.from_pretrained(ZOO["bert"].build(), str(adapter))
        except ConfigError:
            pass
        except (RuntimeError, KeyError) as error:  # PEFT's: another shape, a head that is missing
            assert "size mismatch" in str(error) or "classifier" in str(error), error
    finally:
        (adapter / WEIGHTS).write_bytes(whole)


def _deep() -> str:
    return '{"peft_type": "MSPLORA", "tiers": ' + "[" * 100_000 + "]" * 100_000 + "}"


CONFIGS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no JSON"),
    "cut": (b'{"peft_type": "MSPLORA", "r"', "is no JSON"),
    "list": (b'["MSPLORA"]', "holds a list; a config is a mapping"),
    "number": (b"7", "holds an int; a config is a mapping"),
    "latin": ('{"peft_type": "é"}'.encode("latin-1"), "is no JSON"),
    "deep": (_deep().encode(), "nests lists and dicts deeper than 32 levels"),
    "forty deep": (b'{"peft_type": "MSPLORA", "auto_mapping": ' + b'{"a":' * 40 + b"1" + b"}" * 41, "deeper than 32"),
    "long": (b'{"peft_type": "MSPLORA", "revision": "' + b"x" * 9 * 2**20 + b'"}', "at most 8,388,608 are read"),
    "digits": (b'{"peft_type": "MSPLORA", "r": ' + b"9" * 5000 + b"}", "is no JSON"),
    "nobody's": (b'{"peft_type": "NOBODYS"}', "unknown PEFT method 'NOBODYS'"),
    "no method": (b'{"r": 8}', "unknown PEFT method None"),
    "a list of methods": (b'{"peft_type": ["LORA"]}', r"unknown PEFT method \['LORA'\]"),
    "a task that isn't": (b'{"peft_type": "MSPLORA", "task_type": {"a": 1}}', "is no config of MSPLORA: Invalid task"),
    "a rank that isn't": (b'{"peft_type": "MSPLORA", "r": 1e999}', "r=inf: the rank must be"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_none(name: str, adapter: Path) -> None:
    content, says = CONFIGS[name]
    (adapter / CONFIG).write_bytes(content)
    with pytest.raises(ConfigError, match=says) as caught:
        adapter_config(adapter)
    assert len(str(caught.value)) < 1000


@every_reader
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_links_out_of_the_folder(reader: str, name: str, adapter: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (adapter / name).rename(outside / name)
    (adapter / name).symlink_to(outside / name)
    with pytest.raises(ConfigError, match=r"is a link to .*, outside its folder"):
        READERS[reader](adapter, tmp_path / "out")


def test_links_that_are_all_right(adapter: Path, tmp_path: Path) -> None:
    """Inside the folder, and as the hub's cache lays adapters out: snapshots of links into a store of blobs."""
    (adapter / WEIGHTS).rename(adapter / "real.safetensors")
    (adapter / WEIGHTS).symlink_to("real.safetensors")
    assert tensor_shapes(adapter)
    cache = tmp_path / "hub" / "models--someone--adapter"
    snapshot = cache / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for name, file in ((CONFIG, adapter / CONFIG), (WEIGHTS, adapter / "real.safetensors")):
        (cache / "blobs" / name).write_bytes(file.read_bytes())
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert isinstance(adapter_config(snapshot), MSPLoraConfig)
    PeftModel.from_pretrained(ZOO["bert"].build(), str(snapshot))
    assert own_file(snapshot, CONFIG).is_file()


def test_a_pipe_is_no_file(adapter: Path) -> None:
    (adapter / CONFIG).unlink()
    os.mkfifo(adapter / CONFIG)
    with pytest.raises(ConfigError):
        adapter_config(adapter)


@pytest.mark.parametrize("write", [export, merge])
def test_what_is_copied_beside_an_export_is_the_folders_own(
    write: Callable[..., Any], adapter: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("private")
    (adapter / "tokenizer.json").symlink_to(secret)
    with pytest.raises(ConfigError, match=r"tokenizer\.json is a link to .*id_rsa, outside its folder"):
        write(adapter, tmp_path / "out")
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file() and file.read_bytes() == b"private"]


@pytest.mark.parametrize("reader", ["load", "merge", "export"])
def test_code_beside_the_base_model_never_runs(reader: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (base / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass C: pass\n", encoding="utf-8")
    config = json.loads((base / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.C"}
    (base / "config.json").write_text(json.dumps({**config, "auto_map": auto_map, "model_type": "unheard_of"}))
    with pytest.raises((ConfigError, ValueError), match=r"(?s)custom code|trust_remote_code"):
        READERS[reader](adapter, tmp_path / "out")
    assert not marker.exists()


@pytest.mark.parametrize("library", ["os", "subprocess", "ziggurat.cli", "transformers.utils", "transformers"])
@pytest.mark.parametrize("name", ["system", "Popen", "main", "pipeline", "logging", "__dict__", "x" * 10**4])
def test_a_config_names_no_class_but_a_model(library: str, name: str, adapter: Path) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    config |= {"task_type": None, "auto_mapping": {"parent_library": library, "base_model_class": name}}
    (adapter / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="doesn't name the task of its model"):
        load_base(adapter)


@pytest.fixture
def run_folder(adapter: Path, base: Path) -> Iterator[Path]:
    """As `ziggurat train` leaves it, as far as `predict` reads it before the model."""
    recipe = f"model: {base}\ndata.train: reviews.csv\nmethod.name: msplora\nmethod.r: 4\n"
    (adapter / "recipe.yaml").write_text(recipe, encoding="utf-8")
    (adapter / "run.json").write_text(json.dumps({"head": {"task": "classification", "label_names": ["a", "b", "c"]}}))
    yield adapter


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ("[]", "unfinished run"),
        ("{}", "unfinished run"),
        ('{"head": 7}', "names no labels"),
        ('{"head": {"label_names": 7}}', "names no labels"),
        ('{"head": {"label_names": [], "evil": 1}}', "has been changed"),
        ("[" * 5000 + "]" * 5000, "nests lists"),
        ("{", "is no JSON"),
    ],
)
def test_a_run_file_that_was_changed(run: str, says: str, run_folder: Path) -> None:
    (run_folder / "run.json").write_text(run)
    with pytest.raises(RecipeError, match=says):
        load_adapter_model(run_folder)


@pytest.mark.parametrize("name", ["run.json", "recipe.yaml"])
def test_run_files_that_are_links(name: str, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text((run_folder / name).read_text())
    (run_folder / name).unlink()
    (run_folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(RecipeError, match="is a link to"):
        load_adapter_model(run_folder)


def test_a_whole_model_as_a_pickle(run_folder: Path, tmp_path: Path) -> None:
    """A run of method `full` has no adapter but a model; that too is read from safetensors alone."""
    marker = tmp_path / "ran"
    for name in (CONFIG, WEIGHTS):
        (run_folder / name).unlink()
    ZOO["bert"].build().config.save_pretrained(str(run_folder))
    (run_folder / "recipe.yaml").write_text(
        f"model: {tmp_path / 'base'}\ndata.train: reviews.csv\nmethod.name: full\n", encoding="utf-8"
    )
    torch.save({"x": Bomb(marker)}, run_folder / "pytorch_model.bin")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_adapter_model(run_folder)
    assert not marker.exists()


def test_an_adapter_of_thousands_of_tensors(adapter: Path) -> None:
    save_file({f"base_model.model.t{n}": torch.zeros(1) for n in range(3_000)}, adapter / WEIGHTS)
    with pytest.raises(ConfigError, match="adapter 'default' lacks"):
        PeftModel.from_pretrained(ZOO["plain_list"].build(), str(adapter))
