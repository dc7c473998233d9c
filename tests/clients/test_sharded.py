"""DeepSpeed's ZeRO, FSDP1, and 4-bit weights under FSDP2: two gloo processes learn the same as one. `.ci/clients`."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from sharded import FSDP1, METHODS, ZERO, adapted, fsdp1, in_four_bits, qlora, steps, trained_parameters, zero
from torch.multiprocessing.spawn import spawn

from tolerance import assert_models_agree, model_rounding
from zoo import ZOO

pytestmark = pytest.mark.skipif(
    os.environ.get("ZIGGURAT_CLIENT") != "sharded", reason="neither DeepSpeed nor bitsandbytes: .ci/clients"
)


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qlora")
    ZOO["llama"].build().save_pretrained(folder / "llama")  # type: ignore[operator]
    spawn(qlora, (str(folder),), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    spawn(zero, (str(folder),), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def flattened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp1")
    spawn(fsdp1, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_four_bits_under_fsdp2_train_what_one_process_trains(method: str, four_bits: Path) -> None:
    alone = adapted(in_four_bits(str(four_bits)), method)
    assert any(type(module).__name__ == "Linear4bit" for module in alone.modules())
    check(alone, four_bits / method)


@pytest.mark.parametrize("method", FSDP1)
def test_fsdp1_trains_what_one_process_trains(method: str, flattened: Path) -> None:
    check(adapted(ZOO["llama"].build(), method), flattened / method)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ZERO)
@pytest.mark.parametrize("method", METHODS)
def test_zero_trains_what_one_process_trains(method: str, way: str, partitioned: Path) -> None:
    check(adapted(ZOO["llama"].build(), method), partitioned / f"{method}-{way}")  # type: ignore[arg-type]


def check(alone: Any, written: Path) -> None:
    expected, losses = steps(alone, slice(None)), json.loads(written.with_suffix(".json").read_text())
    assert losses == pytest.approx(expected, rel=model_rounding(3 * 4)) and len(set(losses)) == 3
    tensors, parameters = load_file(written.with_suffix(".safetensors")), trained_parameters(alone)
    assert tensors.keys() == parameters.keys()
    for name, tensor in tensors.items():
        assert_models_agree(tensor, parameters[name].detach(), name=name)
