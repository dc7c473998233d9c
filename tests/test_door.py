"""Adapters load wherever PEFT does, without `import ziggurat`: installing the package is enough.

The metadata of what is installed is written from pyproject.toml, so that these tests never see an older one.
"""

import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from training_tables import save_tiny_bert
from transformers import AutoModelForSequenceClassification

import ziggurat_door
from fresh import Fresh
from installed import ELSEWHERE, PROJECT, install
from ziggurat import LoR2CConfig, MSPLoraConfig
from ziggurat.host.method import METHODS

IDS = "torch.arange(5, 13).reshape(2, 4)"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of MSPLoRA (whole, and one that lacks a tensor), LoR2C, LoRA, and a method from elsewhere."""
    folder = tmp_path_factory.mktemp("door")
    install(folder / "site", PROJECT["name"], PROJECT["entry-points"])
    install(folder / "site", "elsewhere", {"ziggurat.methods": {"elsewhere": "elsewhere_method"}})
    (folder / "site" / "elsewhere_method.py").write_text(ELSEWHERE)
    save_tiny_bert(folder / "bert")
    configs = {
        "msplora": MSPLoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", init_weights=False),
        "lor2c": LoR2CConfig(r=4, task_type="SEQ_CLS", init_weights=False),
        "lora": LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False),
    }
    logits = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(folder / "bert"), config).eval()
        model.save_pretrained(str(folder / name))
        with torch.no_grad():
            logits[name] = model(input_ids=torch.arange(5, 13).reshape(2, 4)).logits
    save_file(logits, folder / "logits.safetensors")
    for name in ("cut", "elsewhere"):
        (folder / name).mkdir()
    config = json.loads((folder / "msplora" / "adapter_config.json").read_text())
    (folder / "cut" / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "msplora" / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if ":A_mid" in name))
    save_file(tensors, folder / "cut" / "adapter_model.safetensors")
    (folder / "elsewhere" / "adapter_config.json").write_text(json.dumps({"peft_type": "ELSEWHERE", "r": 3}))
    return folder


@pytest.fixture(scope="module")
def programs(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fresh]:
    """Programs in forks of a process that has imported PEFT, PEFT before torch, and nothing of ours."""
    path = [str(place / "site"), str(Path(ziggurat_door.__file__).parent)]
    imports = "peft, transformers.modeling_utils, transformers.pipelines"
    with closing(Fresh(tmp_path_factory.mktemp("fresh"), imports, PYTHONPATH=":".join(path))) as fresh:
        yield fresh


START = f"""import sys, torch
from safetensors.torch import load_file
wanted = load_file("logits.safetensors")
def check(model, name):
    assert "ziggurat" in sys.modules
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids={IDS}).logits, wanted[name])
def base():
    from transformers import AutoModelForSequenceClassification
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained("bert")
assert "ziggurat" not in sys.modules
"""

PROGRAMS = {
    "PeftModel": 'from peft import PeftModel\ncheck(PeftModel.from_pretrained(base(), "lor2c"), "lor2c")',
    "PeftConfig": (
        'from peft import PeftConfig\nassert type(PeftConfig.from_pretrained("msplora")).__name__ == "MSPLoraConfig"'
    ),
    "AutoPeftModel": (
        "from peft import AutoPeftModelForSequenceClassification as Auto\n"
        'check(Auto.from_pretrained("msplora"), "msplora")'
    ),
    "AutoModel": (
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        'check(Auto.from_pretrained("msplora"), "msplora")'
    ),
    "load_adapter": 'model = base()\nmodel.load_adapter("msplora")\ncheck(model, "msplora")',
    "load_adapter with a name": 'model = base()\nmodel.load_adapter("lor2c", adapter_name="a")\ncheck(model, "lor2c")',
    "load_adapter of a file that lacks a tensor": (
        'try:\n    base().load_adapter("cut")\n'
        "except Exception as error:\n"
        '    assert type(error).__name__ == "ConfigError" and "A_mid" in str(error), error\n'
        'else:\n    raise AssertionError("loaded")'
    ),
    "pipeline": (
        "from transformers import AutoTokenizer, pipeline\n"
        'words = AutoTokenizer.from_pretrained("bert")\n'
        'pipe = pipeline("text-classification", model="msplora", tokenizer=words)\ncheck(pipe.model, "msplora")'
    ),
    "a method from elsewhere": (
        "from peft import PeftConfig\nassert PeftConfig.from_pretrained('elsewhere').r == 3\n"
        "assert 'elsewhere_method' in sys.modules"
    ),
    "the table": (
        "from peft import PEFT_TYPE_TO_CONFIG_MAPPING as table\n"
        "assert 'NOBODYS' not in table and table.get('NOBODYS') is None and 'ziggurat' not in sys.modules\n"
        "assert 'MSPLORA' in table and table.get('MSPLORA').__name__ == 'MSPLoraConfig'"
    ),
    "PEFT alone": (
        "from peft import PeftModel\n"
        "model = PeftModel.from_pretrained(base(), 'lora').eval()\n"
        "with torch.no_grad():\n"
        f"    assert torch.equal(model(input_ids={IDS}).logits, wanted['lora'])\n"
        "assert 'ziggurat' not in sys.modules"
    ),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_adapter_loads_without_an_import(program: str, place: Path, programs: Fresh) -> None:
    done = programs.run(START + PROGRAMS[program], folder=place)
    assert done.returncode == 0, done.stderr


def test_torch_first_and_looking_for_peft_before_it_is_imported(place: Path) -> None:
    """In an interpreter of its own; the others have imported PEFT before torch."""
    program = (
        "import sys, torch, importlib.util\n"
        "assert importlib.util.find_spec('peft') and not {'peft', 'transformers', 'ziggurat'} & set(sys.modules)\n"
        "assert importlib.util.find_spec('peft.mapping').loader.get_source\n"
        "from peft import PeftConfig\n"
        "assert type(PeftConfig.from_pretrained('msplora')).__name__ == 'MSPLoraConfig'\n"
        "assert 'peft.mapping' not in sys.meta_path[0].waiting"
    )
    path = ":".join([str(place / "site"), str(Path(ziggurat_door.__file__).parent)])
    with closing(Fresh(place, "os", PYTHONPATH=path)) as fresh:
        done = fresh.run(program, folder=place)
    assert done.returncode == 0, done.stderr


def test_the_door_knows_the_methods_by_name() -> None:
    ours = {name for name, method in METHODS.items() if method.config.__module__.startswith("ziggurat.")}
    assert ours == ziggurat_door.METHODS


# --- the finder, on a package made for it -----------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A package `toy_peft` whose module `mapping` is waited for; what has been done."""
    (tmp_path / "toy_peft").mkdir()
    (tmp_path / "toy_peft" / "__init__.py").touch()
    (tmp_path / "toy_peft" / "mapping.py").write_text("TABLE = {}")
    done: list[str] = []
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(ziggurat_door, "_ACTS", {"toy_peft.mapping": lambda module: done.append(module.__name__)})
    yield done
    for name in ("toy_peft", "toy_peft.mapping"):
        sys.modules.pop(name, None)


def test_nothing_is_left_once_the_module_is_there(toy: list[str]) -> None:
    before = list(sys.meta_path)
    ziggurat_door.enter()
    assert importlib.util.find_spec("toy_peft.mapping") is not None and toy == []
    module = importlib.import_module("toy_peft.mapping")
    assert toy == ["toy_peft.mapping"] and sys.meta_path == before
    assert module.__spec__ is not None and module.__spec__.loader is module.__loader__
    assert type(module.__loader__).__module__ != "ziggurat_door"


def test_the_switch_keeps_the_door_shut(toy: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(sys.meta_path)
    monkeypatch.setenv("ZIGGURAT_AUTOLOAD", "0")
    ziggurat_door.enter()
    assert sys.meta_path == before


def test_what_goes_wrong_in_the_door_stops_nobody(toy: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ziggurat_door, "_ACTS", {"toy_peft.mapping": lambda module: module.no_such_name})
    ziggurat_door.enter()
    assert importlib.import_module("toy_peft.mapping").TABLE == {}
    monkeypatch.setattr(ziggurat_door, "_ACTS", None)
    ziggurat_door.enter()


def test_an_import_that_fails_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT too old, say: a bare KeyError would hide it."""
    monkeypatch.setitem(sys.modules, "ziggurat", None)
    with pytest.raises(ImportError, match="ziggurat"):
        ziggurat_door._Table()["MSPLORA"]


def test_a_config_saved_here_names_who_wrote_it(place: Path) -> None:
    """What is there for somebody whose door is shut: PEFT's own error is a KeyError."""
    assert PeftConfig.from_json_file(str(place / "msplora" / "adapter_config.json"))["ziggurat_version"]


@pytest.mark.skipif(peft.__version__ != "0.21.2" or shutil.which("git") is None, reason="the patch is for PEFT 0.21.2")
def test_the_change_that_is_proposed_to_peft_applies(tmp_path: Path) -> None:
    """docs/peft-entry-points.md. With it an adapter loaded without the door, by hand."""
    page = (Path(__file__).parents[1] / "docs" / "peft-entry-points.md").read_text(encoding="utf-8")
    (tmp_path / "change.diff").write_text(page.partition("```diff\n")[2].partition("```")[0])
    for name in ("mapping.py", "utils/peft_types.py"):
        (tmp_path / "src/peft" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(peft.__file__).parent / name, tmp_path / "src/peft" / name)
    subprocess.run(["git", "apply", "--whitespace=nowarn", "change.diff"], cwd=tmp_path, check=True)
    assert "_ConfigMapping()" in (tmp_path / "src/peft/mapping.py").read_text()
    assert "_member_map_" in (tmp_path / "src/peft/utils/peft_types.py").read_text()
