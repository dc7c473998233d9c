"""Model cards filled from the run, and uploads to a stand-in for the hub on this machine."""

import base64
import json
import shlex
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from training_tables import reviews, save_tiny_bert, tiny_recipe, write_csv

from commands import main
from ziggurat.training.answers.load import load_adapter_model
from ziggurat.training.loop.run import train


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks for an upload: who I am, a repository, where files go, a commit."""

    address: str
    files: dict[str, bytes]
    asked: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        known = self.headers.get("Authorization") == "Bearer hf_right"
        self._answer({"name": "me"} if known else {"error": "Invalid user token."}, 200 if known else 401)

    def do_POST(self) -> None:
        self.asked.append(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self._answer({"url": f"http://{self.headers['Host']}/me/{json.loads(body)['name']}"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._answer({"commitUrl": f"http://{self.headers['Host']}/me/mine/commit/1", "commitOid": "1" * 40})
        else:
            self._answer({"errors": [], "warnings": []})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.files, Hub.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.address = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", f"http://{Hub.address}")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    save_tiny_bert(folder / "tiny-bert")
    data = write_csv(folder / "reviews.csv", [*reviews(24), {"text": "", "label": "pos"}])
    more = {"train__max_steps": 2, "data__drop_missing": True}  # of which a note names the file
    return train(tiny_recipe(folder / "tiny-bert", data, folder / "out", **more)).folder


def test_the_card_is_filled(run: Path) -> None:
    text = (run / "README.md").read_text()
    assert "More Information Needed" not in text and "`tiny-bert`, a model in a folder" in text
    front = yaml.safe_load(text.split("---")[1])
    assert front["tags"] == ["ziggurat", "msplora", "classification"] and "base_model" not in front
    info = json.loads((run / "run.json").read_text())
    cells = f"{info['before']['accuracy']:.2f} | {info['after']['accuracy']:.2f} | {info['guess']['accuracy']:.2f}"
    assert f"| accuracy | {cells} |" in text and "`reviews.csv`: 16 rows learned from, 8 scored on." in text
    assert f"torch {info['versions']['torch']}" in text and "from peft import PeftModel" in text


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_what_the_card_says_loads_a_method_of_peft(pooling: str, run: Path, tmp_path: Path) -> None:
    rows = reviews(24)
    for row in rows[::3]:
        row["label"] = "fair"
    data, steps = write_csv(tmp_path / "three.csv", rows), {"train__max_steps": 1}
    made = tiny_recipe(
        run.parent / "tiny-bert", data, tmp_path / "out", method__name="lora", head__pooling=pooling, **steps
    )
    folder = train(made).folder
    code = (folder / "README.md").read_text().rpartition("```python")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(folder)), names)
    ours = load_adapter_model(folder)
    inputs = ours.tokenizer("the film is very good", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(names["model"].eval()(**inputs).logits, ours.model(**inputs).logits)


def test_an_adapter_an_export_and_a_merged_model_are_uploaded(
    run: Path, tmp_path: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    from ziggurat.export.push import push

    assert push(run, "me/mine").endswith("/me/mine")
    assert hub.files["adapter_model.safetensors"] == (run / "adapter_model.safetensors").read_bytes()
    # Neither paths of this machine nor texts of the validation rows leave it.
    assert str(run.parent / "reviews.csv") in "".join(json.loads((run / "run.json").read_text())["notes"])
    for name in ("run.json", "recipe.yaml", "adapter_config.json", "README.md"):
        assert str(run.parent).encode() not in hub.files[name], name
    assert b"mistakes" not in hub.files["run.json"] and b"mistakes" in (run / "run.json").read_bytes()
    for command, file in (("export", "adapter_config.json"), ("merge", "config.json")):
        hub.files.clear()
        assert main(command, str(run), str(tmp_path / command), "--push-to-hub", "mine") == 0
        assert "uploaded to " in capsys.readouterr().out and file in hub.files


def test_paths_of_windows_are_paths_on_any_machine(run: Path, tmp_path: Path, hub: type[Hub]) -> None:
    """A folder that was trained there and is uploaded from here."""
    from ziggurat.export.push import push
    from ziggurat.nearest import is_path

    base, data = r"C:\Users\me\models\roberta", r"D:\data\reviews.csv"
    assert is_path(base) and is_path(r"models\roberta") and not is_path("me/roberta") and not is_path("roberta")
    folder = shutil.copytree(run, tmp_path / "from-windows")
    for name, key, value in (("adapter_config.json", "base_model_name_or_path", base), ("recipe.yaml", "model", base)):
        values = yaml.safe_load((folder / name).read_text())
        values |= {key: value} | ({"data.train": data} if name == "recipe.yaml" else {})
        (folder / name).write_text(json.dumps(values))
    (folder / "Modelfile").write_text(f"FROM {base}\nADAPTER .\n")
    assert push(folder, "me/mine").endswith("/me/mine")
    assert hub.files["Modelfile"] == b"FROM roberta\nADAPTER .\n"
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "roberta"
    content = yaml.safe_load(hub.files["recipe.yaml"])
    assert (content["model"], content["data.train"]) == ("roberta", "reviews.csv")
    assert b"Users" not in hub.files["adapter_config.json"] + hub.files["recipe.yaml"]


def test_relative_paths_are_paths_and_names_of_models_are_not(tmp_path: Path, hub: type[Hub]) -> None:
    """A base folder that was gone at the export leaves its path as the adapter's config has it."""
    from ziggurat.export.gguf import modelfile
    from ziggurat.export.push import push

    for base, named in (
        ("./private/x", "x"),
        ("../x", "x"),
        ("me/private/x", "x"),
        (r"private\x", "x"),
        ("org/x", "org/x"),
        ("hf.co/org/x:Q4", "hf.co/org/x:Q4"),
    ):
        (tmp_path / "Modelfile").write_text(modelfile(base))
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        push(tmp_path, "me/mine")
        assert f"\nFROM {named}\n".encode() in hub.files["Modelfile"]
        if named == "x":
            assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "x"


def test_who_is_not_logged_in_hears_it_before_any_work(
    run: Path, tmp_path: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main("train", str(run / "recipe.yaml"), f"output={tmp_path / 'new'}", "--push-to-hub", "me/mine") == 2
    assert "--push-to-hub: not logged in" in capsys.readouterr().err
    assert not list(tmp_path.glob("new*")) and hub.asked == ["/api/whoami-v2"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert main("export", str(run), str(tmp_path / "new"), "--push-to-hub", "me/mine") == 2
    assert "--push-to-hub: the hub can't be reached" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_an_upload_that_fails_can_be_made_again_as_private_as_before(
    run: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ziggurat.errors import ExportError
    from ziggurat.export.push import push

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ExportError) as failed:
        push(run, "me/mine", private=True)
    monkeypatch.setenv("HF_ENDPOINT", f"http://{hub.address}")
    command = shlex.split(str(failed.value).partition("`")[2].partition("`")[0])
    assert command[:2] == ["python", "-c"] and "hf upload" not in str(failed.value)
    exec(command[2], {})
    assert b"mistakes" not in hub.files["run.json"]
