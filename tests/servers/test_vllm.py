"""What vLLM asks of an adapter, rule by rule, of serving exports of every method that has one; and by vLLM itself.

The rules are those of vllm/lora/peft_helper.py, lora_model.py, utils.py and config/lora.py at 0.33, and of 0.10 to 0.26
where those are stricter (no modules_to_save at all, patterns not read). Where vLLM is installed its own classes judge.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from methods_table import zoo_config
from ziggurat.export import SERVING_RANKS, export_model
from zoo import ZOO

#: What initialisations may be named in a config: those that leave the base's weights alone.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga")


def refusals(config: dict[str, Any], tensors: dict[str, Tensor], max_lora_rank: int, modules: set[str]) -> list[str]:
    """Why vLLM would not load an adapter, or not read it as PEFT does; `modules`: last names of the model's linears."""
    found = [f"lacks {name}" for name in ("r", "lora_alpha", "target_modules") if name not in config]
    found += [] if max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512) else ["max_lora_rank"]
    ranks = [config.get("r", 0), *(config.get("rank_pattern") or {}).values()]
    found += [] if all(isinstance(rank, int) and 0 < rank <= max_lora_rank for rank in ranks) else ["rank"]
    refused = ("modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication")
    refused += ("use_bdlora", "use_qalora", "rank_pattern", "alpha_pattern")
    found += [name for name in refused if config.get(name)]
    found += [] if config.get("bias", "none") == "none" else ["bias"]
    found += [] if config.get("init_lora_weights", True) in PLAIN_STARTS else ["init_lora_weights"]
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[:2] != ["base_model", "model"] or parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
            found.append(f"the name {name}")
        elif parts[-3] not in modules:
            found.append(f"the module {name}")
        elif tensor.shape[0 if parts[-2] == "lora_A" else 1] != config.get("r"):
            found.append(f"the shape of {name}")
    return found


def scale(config: dict[str, Any]) -> float:
    """vLLM's one scale of all modules: lora_alpha / r, over sqrt(r) with rsLoRA."""
    return config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])


def exported(method: str, folder: Path, **fields: Any) -> tuple[dict[str, Any], dict[str, Tensor], int]:
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "down_proj"]
    made = get_peft_model(
        ZOO["llama"].build(), zoo_config(method, "llama", target_modules=targets, init_weights=False, **fields)
    )
    written = export_model(made, folder, serving=True)
    return (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(next(folder.glob("*.safetensors"))),
        written.rank,
    )


METHODS = {"msplora": {"use_rslora": True}, "lora2": {"r": 3}, "dylora": {}}


@pytest.mark.parametrize("method", METHODS)
def test_every_rule_holds(method: str, tmp_path: Path) -> None:
    config, tensors, rank = exported(method, tmp_path / "out", **METHODS[method])
    assert refusals(config, tensors, rank, {"q_proj", "v_proj", "down_proj"}) == []
    assert rank in SERVING_RANKS and scale(config) == 1.0 and config["peft_type"] == "LORA"
    assert set(config["target_modules"]) == {"q_proj", "v_proj", "down_proj"}
    assert {name.rpartition(".lora_")[0] for name in tensors} == {
        f"base_model.model.model.layers.{layer}.{part}"
        for layer in range(ZOO["llama"].build().config.num_hidden_layers)
        for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }


@pytest.mark.parametrize(
    "change,message",
    [
        ({"r": 0}, "rank"),
        ({"r": 9}, "rank"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ],
    ids=str,
)
def test_every_rule_bites(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config, tensors, _ = exported("msplora", tmp_path / "out")
    assert message in refusals({**config, **change}, tensors, 8, {"q_proj", "v_proj", "down_proj"})


class Server:
    """What vLLM's check reads of its own settings."""

    def __init__(self, max_lora_rank: int) -> None:
        self.max_lora_rank = max_lora_rank


@pytest.mark.parametrize("method", METHODS)
def test_vllm_takes_the_config(method: str, tmp_path: Path) -> None:
    helpers = pytest.importorskip("vllm.lora.peft_helper", exc_type=ImportError)
    _, _, rank = exported(method, tmp_path / "out", **METHODS[method])
    helper = helpers.PEFTHelper.from_local_dir(str(tmp_path / "out"), 512)
    helper.validate_legal(Server(rank))
    assert helper.vllm_lora_scaling_factor == 1.0
    with pytest.raises(ValueError, match="greater than max_lora_rank"):
        helper.validate_legal(Server(rank - 1))


@pytest.mark.parametrize("method", METHODS)
def test_vllm_takes_the_weights(method: str, tmp_path: Path) -> None:
    helpers = pytest.importorskip("vllm.lora.peft_helper", exc_type=ImportError)
    models = pytest.importorskip("vllm.lora.lora_model", exc_type=ImportError)
    _, tensors, rank = exported(method, tmp_path / "out", **METHODS[method])
    helper = helpers.PEFTHelper.from_local_dir(str(tmp_path / "out"), 512)
    expected = {"q_proj", "v_proj", "down_proj"}
    loaded = models.LoRAModel.from_local_checkpoint(
        str(tmp_path / "out"), expected, helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )
    for path, weights in loaded.loras.items():
        for side, factor in (("A", weights.lora_a), ("B", weights.lora_b)):
            assert torch.equal(factor, tensors[f"base_model.model.{path}.lora_{side}.weight"])
        assert weights.scaling == 1.0 and weights.rank == rank
    assert len(loaded.loras) * 2 == len(tensors)
