"""vLLM's and llama.cpp's own runtimes compute with a serving export, and a merged model, what Ziggurat computes.

Both need an environment of their own, which `.ci/clients vllm llama_cpp` makes; without one the tests are skipped.

    ZIGGURAT_VLLM_PYTHON      a python that has vLLM
    ZIGGURAT_LLAMA_PYTHON     a python that has llama-cpp-python
    ZIGGURAT_LLAMA_CPP        llama.cpp's source, for its converters

The reference is the unmerged model in float32. Weights, keys and values are float32 in the servers too; but they add in
another order, over up to 192 products a row and 4 layers, and llama.cpp multiplies up its rotary angles. Measured: at
most 6e-5 on logits of size 5. An adapter changes logits by 3 and more.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from commands import main
from ziggurat import LoR2CConfig
from ziggurat.export import merge

pytest.importorskip("sentencepiece")
from served_models import PROMPTS, STEPS, VOCABULARY, Served, Spoken, build, spoken

HERE = Path(__file__).parent
ADAPTERS = ("msplora", "msplora_everywhere", "lora2", "lora2_everywhere", "dylora")
EXACT: dict[str, float] = {"rtol": 0.0, "atol": 2e-4}
#: Of a text's logits, relative, in the 2-norm. Half precision rounds every weight and every input of a product by up to
#: 2^-11 = 5e-4; measured: 2e-3 without an adapter, 4e-3 with one.
HALF = 1e-2
pytestmark = pytest.mark.timeout(1200)


def needs(*variables: str) -> pytest.MarkDecorator:
    lacking = [name for name in variables if not os.environ.get(name)]
    return pytest.mark.skipif(bool(lacking), reason=f"no {' and no '.join(lacking)}, which .ci/clients sets")


VLLM = needs("ZIGGURAT_VLLM_PYTHON")
LLAMA_CPP = needs("ZIGGURAT_LLAMA_PYTHON", "ZIGGURAT_LLAMA_CPP")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return build(tmp_path_factory.mktemp("served"))


def run(*command: str | Path) -> None:
    """A command of another project, which is not to see this one's files nor the network."""
    apart = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=apart, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-4000:]}"


def off(actual: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((actual - expected).norm() / expected.norm())


def differs(served: Served, name: str) -> bool:
    """Whether an adapter changes every prompt's logits far more than the tolerances; else agreement says nothing."""
    pairs = zip(served.expected[name], served.expected["base"], strict=True)
    return all(off(a.logits[: a.prompt], b.logits[: b.prompt]) > 20 * HALF for a, b in pairs)


# --- vLLM -----------------------------------------------------------------------------------------


def ask_vllm(
    folder: Path,
    model: Path,
    adapters: dict[str, Path],
    max_lora_rank: int = 0,
    refused: dict[str, Path] | None = None,
    own_code: bool = False,
) -> dict[str, Tensor]:
    job = {
        "refused": {name: str(path) for name, path in (refused or {}).items()},
        "model": str(model),
        "adapters": {name: str(path) for name, path in adapters.items()},
        "max_lora_rank": max_lora_rank,
        "own_code": own_code,
        "prompts": PROMPTS,
        "steps": STEPS,
        "vocabulary": VOCABULARY,
    }
    (folder / "job.json").write_text(json.dumps(job))
    run(os.environ["ZIGGURAT_VLLM_PYTHON"], HERE / "ask_vllm.py", folder / "job.json", folder / "out.npz")
    return {name: torch.tensor(array) for name, array in np.load(folder / "out.npz").items()}


def check_vllm(actual: dict[str, Tensor], name: str, expected: list[Spoken]) -> None:
    """The tokens vLLM chose are ours, and so is every token's log-probability at every step."""
    for number, text in enumerate(expected):
        assert actual[f"{name}/{number}/tokens"].tolist() == text.ids[text.prompt :]
        ours = text.logits[text.prompt - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(actual[f"{name}/{number}/logprobs"].float(), ours, **EXACT)


@VLLM
def test_vllm_serves_all_exports_at_once(served: Served, tmp_path: Path) -> None:
    replies = ask_vllm(tmp_path, served.base, served.exports, max(served.ranks.values()))
    assert set(served.exports) == set(ADAPTERS)
    for name in ADAPTERS:
        assert differs(served, name)
        check_vllm(replies, name, served.expected[name])
        assert int(replies[f"{name}/least"]) == served.ranks[name]


@VLLM
def test_vllm_takes_folders_as_they_were_saved(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the plugin; one that needs a higher rank is refused with that rank, and the engine goes on."""
    monkeypatch.setenv("ZIGGURAT_CACHE", str(tmp_path / "cache"))
    saved = {name: served.exports[name].with_name(name) for name in ("msplora", "lora2_everywhere")}
    high = {"high": served.exports["msplora_everywhere"].with_name("msplora_everywhere")}
    replies = ask_vllm(tmp_path, served.base, saved, max(served.ranks[name] for name in saved), high)
    for name in saved:
        assert differs(served, name)
        check_vllm(replies, name, served.expected[name])
    refusal = bytes(replies["high/refused"].tolist()).decode()
    assert f"start it with --max-lora-rank {served.ranks['msplora_everywhere']}" in refusal


@VLLM
@pytest.mark.parametrize("name", ["base", "msplora_everywhere", "lora2_everywhere"])
def test_vllm_runs_the_base_and_merged_models(name: str, served: Served, tmp_path: Path) -> None:
    replies = ask_vllm(tmp_path, served.merged.get(name, served.base), {})
    check_vllm(replies, "base", served.expected[name])


@VLLM
def test_vllm_runs_paths_and_spans(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that `merge` writes of LoR2C brings its code along, which vLLM's back end for transformers runs."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    torch.manual_seed(2)
    config = LoR2CConfig(r=4, merges=1, injections=1, init_weights=False, task_type="CAUSAL_LM")
    model: Any = get_peft_model(LlamaForCausalLM.from_pretrained(str(served.base)), config).eval()
    for step in range(7):
        model.restructure(step, 24)
    model.save_pretrained(str(tmp_path / "adapter"))
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["structure"]["stacks"]
    assert any(first < last for state in saved.values() for first, last in state["spans"])
    expected = spoken(model)
    replies = ask_vllm(tmp_path, merge(tmp_path / "adapter", tmp_path / "merged"), {}, own_code=True)
    assert all(off(a.logits, b.logits) > 20 * HALF for a, b in zip(expected, served.expected["base"], strict=True))
    check_vllm(replies, "base", expected)


# --- llama.cpp ------------------------------------------------------------------------------------


def convert(script: str, source: Path, target: Path, outtype: str, *more: str | Path) -> Path:
    """What llama.cpp's own converter writes; ours is the python that has torch and transformers."""
    converter = Path(os.environ["ZIGGURAT_LLAMA_CPP"]) / script
    run(sys.executable, converter, source, "--outfile", target, "--outtype", outtype, *more)
    return target


def ask_llama_cpp(folder: Path, models: dict[str, Any]) -> dict[str, Tensor]:
    (folder / "job.json").write_text(json.dumps({"models": models}))
    run(os.environ["ZIGGURAT_LLAMA_PYTHON"], HERE / "ask_llama_cpp.py", folder / "job.json", folder / "out.npz")
    return {name: torch.tensor(array) for name, array in np.load(folder / "out.npz").items()}


def texts(expected: list[Spoken]) -> list[dict[str, Any]]:
    return [{"prompt": text.prompt, "ids": text.ids} for text in expected]


def as_gguf(served: Served, name: str, folder: Path, outtype: str) -> dict[str, Any]:
    """A job's entry for the base with the adapter `name`, both converted."""
    base, adapter = folder / "base.gguf", folder / f"{name}.gguf"
    if not base.exists():
        convert("convert_hf_to_gguf.py", served.base, base, outtype)
    if name != "base":
        convert("convert_lora_to_gguf.py", served.exports[name], adapter, outtype, "--base", served.base)
    return {
        "model": str(base),
        "adapter": None if name == "base" else str(adapter),
        "texts": texts(served.expected[name]),
    }


@LLAMA_CPP
def test_export_writes_gguf_by_the_converter(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("LLAMA_CPP", os.environ["ZIGGURAT_LLAMA_CPP"])
    assert main("export", str(served.exports["msplora"].with_name("msplora")), str(tmp_path / "out"), "--gguf") == 0
    names = {tensor.name for tensor in gguf.GGUFReader(str(tmp_path / "out" / "adapter.gguf")).tensors}
    assert {name.rpartition(".")[2] for name in names} == {"lora_a", "lora_b"} and len(names) == 2 * 2 * 4


@LLAMA_CPP
def test_llama_cpp_serves_exports(served: Served, tmp_path: Path) -> None:
    replies = ask_llama_cpp(tmp_path, {name: as_gguf(served, name, tmp_path, "f32") for name in served.expected})
    for name, expected in served.expected.items():
        assert name == "base" or differs(served, name)
        for number, text in enumerate(expected):
            torch.testing.assert_close(replies[f"{name}/{number}"], text.logits, **EXACT)


@LLAMA_CPP
def test_llama_cpp_serves_exports_in_half_precision(served: Served, tmp_path: Path) -> None:
    names = ("msplora_everywhere", "lora2_everywhere")
    replies = ask_llama_cpp(tmp_path, {name: as_gguf(served, name, tmp_path, "f16") for name in names})
    for name in names:
        for number, text in enumerate(served.expected[name]):
            assert off(replies[f"{name}/{number}"], text.logits) < HALF


@LLAMA_CPP
def test_llama_cpp_runs_merged_models(served: Served, tmp_path: Path) -> None:
    models: dict[str, Any] = {}
    for name, folder in served.merged.items():
        merged = convert("convert_hf_to_gguf.py", folder, tmp_path / f"{name}.gguf", "f32")
        models[name] = {"model": str(merged), "adapter": None, "texts": texts(served.expected[name])}
    replies = ask_llama_cpp(tmp_path, models)
    for name in served.merged:
        for number, text in enumerate(served.expected[name]):
            torch.testing.assert_close(replies[f"{name}/{number}"], text.logits, **EXACT)
