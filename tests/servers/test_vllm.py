"""What vLLM asks of an adapter, rule by rule, of serving exports of every method that has one; and by vLLM itself.

The rules are those of vllm/lora/peft_helper.py, lora_model.py, utils.py and config/lora.py at 0.33, and of 0.10 to 0.26
where those are stricter (no modules_to_save at all, patterns not read). Where vLLM is installed its own classes judge.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from commands import main
from methods_table import logits, zoo_config
from moe_models import ALL_MIXTURES, EXPERTS, ROUTERS, mixture, tokens
from tolerance import assert_models_agree
from ziggurat import MSPLoraConfig
from ziggurat.errors import ExportError
from ziggurat.export import SERVING_RANKS, Exported, export_model, lora_pairs
from ziggurat.lowrank.pair import FactorPair
from zoo import ZOO

#: What initialisations may be named in a config: those that leave the base's weights alone.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga")


def refusals(config: dict[str, Any], tensors: dict[str, Tensor], max_lora_rank: int, modules: set[str]) -> list[str]:
    """Why vLLM would not load an adapter, or not read it as PEFT does; `modules`: last names of the model's linears."""
    faults = [f"lacks {name}" for name in ("r", "lora_alpha", "target_modules") if name not in config]
    faults += [] if max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512) else ["max_lora_rank"]
    ranks = [config.get("r", 0), *(config.get("rank_pattern") or {}).values()]
    faults += [] if all(isinstance(rank, int) and 0 < rank <= max_lora_rank for rank in ranks) else ["rank"]
    refused = ("modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication")
    refused += ("use_bdlora", "use_qalora", "rank_pattern", "alpha_pattern")
    faults += [name for name in refused if config.get(name)]
    faults += [] if config.get("bias", "none") == "none" else ["bias"]
    faults += [] if config.get("init_lora_weights", True) in PLAIN_STARTS else ["init_lora_weights"]
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[:2] != ["base_model", "model"] or parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
            faults.append(f"the name {name}")
        elif parts[-3] not in modules:
            faults.append(f"the module {name}")
        elif tensor.shape[0 if parts[-2] == "lora_A" else 1] != config.get("r"):
            faults.append(f"the shape of {name}")
    return faults


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


# Fused experts


#: vLLM's names of the gate, down and up projection of an expert.
EACH = {
    name: ("w1", "w2", "w3") if name == "mixtral" else ("gate_proj", "down_proj", "up_proj") for name in ALL_MIXTURES
}


@pytest.fixture(params=ALL_MIXTURES)
def experts(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any, dict[str, FactorPair], Exported]:
    """The type of a mixture; its model with adapters of the gate and up projection of experts, and of the router, but
    not of the down projection; the pairs of its experts, by what vLLM calls the experts; the serving export.
    """
    name: str = request.param
    torch.manual_seed(0)
    named = [EXPERTS[0], ROUTERS[name]]
    config = MSPLoraConfig(r=4, target_modules=["o_proj"], target_parameters=named, init_weights=False)
    model = get_peft_model(mixture(name), config).eval()
    exported = export_model(model, tmp_path / "out", serving=True)
    pairs = {
        path.removesuffix(".gate_up_proj").replace("mlp", "block_sparse_moe" if name == "mixtral" else "mlp"): pair
        for path, pair in lora_pairs(model).items()
        if pair.A.dim() == 3
    }
    assert pairs
    return name, model, pairs, exported


def test_experts_have_vllms_names(experts: Any) -> None:
    name, model, pairs, exported = experts
    folder, rank = exported.folder, exported.rank
    tensors = {n.removeprefix("base_model.model."): t for n, t in load_file(next(folder.glob("*.safetensors"))).items()}

    def at(path: str) -> tuple[Tensor, Tensor]:
        return tensors.pop(f"{path}.lora_A.weight"), tensors.pop(f"{path}.lora_B.weight")

    for path, (A, B) in pairs.items():
        at(path.replace("experts", "router" if name == "gpt_oss" else "gate"))
        if name == "gpt_oss":  # A by expert and rank, B by rank and expert
            (a, b), (_, down) = at(f"{path}.base_layer"), at(path)
            a, b = a.view(len(A), rank, -1), b.view(-1, rank, len(A)).permute(2, 0, 1)
            torch.testing.assert_close(b @ a, B @ A)
            assert not down.any()
            continue
        for expert in range(len(A)):
            gate, down, up = (at(f"{path}.{expert}.{leaf}") for leaf in EACH[name])
            torch.testing.assert_close(torch.cat([gate[1] @ gate[0], up[1] @ up[0]]), B[expert] @ A[expert])
            assert not down[1].any() and down[0].shape == (rank, B.shape[1] // 2)
    assert all("o_proj" in other for other in tensors)
    again = PeftModel.from_pretrained(mixture(name), str(folder)).eval()
    assert any("experts" in path for path, _ in again.named_parameters() if "lora" in path) != exported.only_for_vllm
    assert ("for vLLM alone" in (folder / "README.md").read_text()) == exported.only_for_vllm
    if not exported.only_for_vllm:
        assert_models_agree(logits(again, tokens()), logits(model, tokens()))


def test_vllm_packs_the_experts(experts: Any) -> None:
    helpers = pytest.importorskip("vllm.lora.peft_helper", exc_type=ImportError)
    models = pytest.importorskip("vllm.lora.lora_model", exc_type=ImportError)
    weights = pytest.importorskip("vllm.lora.lora_weights", exc_type=ImportError)
    routed = pytest.importorskip("vllm.model_executor.layers.fused_moe.routed_experts", exc_type=ImportError)
    name, _, pairs, exported = experts
    folder, rank = exported.folder, exported.rank
    helper = helpers.PEFTHelper.from_local_dir(str(folder), 512)
    helper.validate_legal(Server(rank))
    gate, down, up = EACH[name]
    number = len(next(iter(pairs.values())).A)
    mapping = routed.RoutedExperts.build_expert_params_mapping(gate, down, up, num_experts=number)
    each = [weight.rstrip(".") for _, weight, _, _ in mapping]
    expected = {"o_proj", "gate", "router", "experts", *(each if name != "gpt_oss" else ())}
    loaded = models.LoRAModel.from_local_checkpoint(
        str(folder), expected, helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )
    for path, (A, B) in pairs.items():
        if name == "gpt_oss":
            assert {path, f"{path}.base_layer"} <= loaded.loras.keys()
            continue
        of_experts = [loaded.get_lora(path.replace("experts", leaf)) for leaf in each]
        packed = weights.PackedLoRALayerWeights.pack_moe(of_experts, path)
        (w1, w2, w3), (b1, b2, b3) = packed.lora_a, packed.lora_b
        torch.testing.assert_close(torch.cat([b1 @ w1, b3 @ w3], dim=1), B @ A)
        assert not (b2 @ w2).any()


def test_experts_of_other_models_are_refused(tmp_path: Path) -> None:
    config = MSPLoraConfig(r=4, target_parameters=EXPERTS, init_weights=False)
    model = get_peft_model(mixture("olmoe"), config)
    model.get_base_model().config.model_type = "unheard_of"
    with pytest.raises(
        ExportError, match=r"experts of a unheard_of, and vLLM's names of experts are known here for deep"
    ):
        export_model(model, tmp_path / "out", serving=True)
    assert not (tmp_path / "out").exists()


def test_a_router_alone_brings_no_experts(tmp_path: Path) -> None:
    config = MSPLoraConfig(r=4, target_modules=["o_proj"], target_parameters=["gate.weight"], init_weights=False)
    model = get_peft_model(mixture("olmoe"), config).eval()
    export_model(model, tmp_path / "out", serving=True)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["o_proj"]
    assert all(name.endswith("gate.weight") for name in written["target_parameters"])
    again = PeftModel.from_pretrained(mixture("olmoe"), str(tmp_path / "out")).eval()
    assert_models_agree(logits(again, tokens()), logits(model, tokens()))


def test_nothing_of_llama_cpp_is_promised_for_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture("qwen2_moe").save_pretrained(tmp_path / "base")
    base = type(mixture("qwen2_moe")).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, MSPLoraConfig(r=4, target_parameters=EXPERTS, init_weights=False))
    model.save_pretrained(str(tmp_path / "adapter"))
    export_model(model, tmp_path / "serving", serving=True)
    assert not (tmp_path / "serving" / "Modelfile").exists()
    assert "llama.cpp" not in (tmp_path / "serving" / "README.md").read_text()
    assert main("export", str(tmp_path / "adapter"), str(tmp_path / "again"), "--serving") == 0
    assert "for vLLM alone: PEFT would leave the experts out" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "convert_lora_to_gguf.py").write_text("")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    assert main("export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--gguf") == 2
    printed = capsys.readouterr().err
    assert "llama.cpp's converter knows the factor pairs of linear layers alone" in " ".join(printed.split())
    assert not (tmp_path / "out").exists()
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({**written, "target_parameters": None, "base_model_name_or_path": None})
    )
    assert main("export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--gguf") == 2
    assert "the adapter doesn't name it: give --base" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
