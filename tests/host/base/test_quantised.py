"""Bases with quantised weights: they train by their own forward; merging reports its error, or refuses."""

import copy
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, Qwen2Config

from methods_table import logits
from tolerance import assert_sums_agree
from ziggurat import LoR2CConfig, LoRA2Config, MSPLoraConfig
from ziggurat.host.linear import AdaptedLinear
from ziggurat.host.paths.layer import PathLayer
from zoo import seeded

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["q_proj", "v_proj"]
WIDTH = 64  # bitsandbytes' kernels want multiples of 32


def qwen() -> nn.Module:
    """A decoder whose query and value have biases, wide enough for every kernel."""
    config = Qwen2Config(
        vocab_size=WIDTH,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = seeded(lambda: AutoModelForCausalLM.from_config(config))
    with torch.no_grad():  # biases are zero at first, and losing them would go unseen
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()))
    return model


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(3, WIDTH, (2, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def swap_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """`model` with every linear but the head replaced by `make` of it."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, make(module.requires_grad_(False)))
    return model.eval()


# --- ways to quantise -----------------------------------------------------------------------------


def bnb_8bit() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear: nn.Linear) -> nn.Module:
        bias = linear.bias is not None
        made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=bias, has_fp16_weights=False)
        made.load_state_dict(linear.state_dict())
        return made.to("cpu")

    return swap_linears(qwen(), make)


def bnb_4bit() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear: nn.Linear) -> nn.Module:
        bias, sizes = linear.bias is not None, (linear.in_features, linear.out_features)
        made = bnb.nn.Linear4bit(*sizes, bias=bias, quant_type="nf4", compute_dtype=torch.float32)
        made.load_state_dict(linear.state_dict())
        return made.to("cpu").requires_grad_(False)

    return swap_linears(qwen(), make)


def hqq() -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize")

    def make(linear: nn.Linear) -> nn.Module:
        config = quantize.BaseQuantizeConfig(nbits=4, group_size=32)
        return quantize.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")

    return swap_linears(qwen(), make)


def torchao_bare() -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    model = qwen().requires_grad_(False)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda m, path: "_proj" in path)
    return model


def reloaded(quantization_config: Any, tmp_path: Path) -> nn.Module:
    """The model as transformers loads it with a quantisation config."""
    qwen().save_pretrained(tmp_path / "base")
    path = str(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization_config, device_map="cpu").eval()


def transformers_bnb_8bit(tmp_path: Path) -> nn.Module:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return reloaded(BitsAndBytesConfig(load_in_8bit=True), tmp_path)


def transformers_bnb_4bit(tmp_path: Path) -> nn.Module:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4")
    return reloaded(config, tmp_path)


def transformers_torchao_int8(tmp_path: Path) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return reloaded(TorchAoConfig(torchao.Int8WeightOnlyConfig()), tmp_path)


def transformers_torchao_int4(tmp_path: Path) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32))
    return reloaded(TorchAoConfig(config), tmp_path)


class PackedLinear(nn.Module):
    """Two 4-bit numbers a byte and a scale a row, with the layer interface of GPTQ: `qweight`, sizes, no `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.abs().amax(1, keepdim=True) / 7
        digits = (linear.weight / scales).round().to(torch.int16) + 8
        self.register_buffer("qweight", (digits[:, ::2] * 16 + digits[:, 1::2]).to(torch.uint8))
        self.register_buffer("scales", scales.detach())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        digits = torch.stack([self.qweight // 16, self.qweight % 16], dim=-1).flatten(1).to(x.dtype) - 8
        return functional.linear(x, digits * self.scales, self.bias)


class Float8Linear(nn.Linear):
    """A subclass of nn.Linear whose weight is float8 with one scale, as fine-grained FP8 checkpoints have."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.register_buffer("weight_scale", linear.weight.detach().abs().max() / 448)
        weight = (linear.weight.detach() / self.weight_scale).to(torch.float8_e4m3fn)
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), linear.bias

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight.to(input.dtype) * self.weight_scale, self.bias)


@dataclass(frozen=True)
class Way:
    """A way to quantise: `build` (given a folder to write to); `close`: how far merging may move what it changed."""

    build: Callable[[Path], nn.Module]
    close: float = 0.0


MERGING = {
    "bnb_8bit": Way(lambda _: bnb_8bit(), 0.2),
    "bnb_4bit": Way(lambda _: bnb_4bit(), 0.7),
    "hqq_4bit": Way(lambda _: hqq(), 0.7),
    "transformers_bnb_8bit": Way(transformers_bnb_8bit, 0.2),
    "transformers_bnb_4bit": Way(transformers_bnb_4bit, 0.7),
    "transformers_torchao_int8": Way(transformers_torchao_int8, 0.2),
    "transformers_torchao_int4": Way(transformers_torchao_int4, 0.7),
}
FORWARD_ONLY = {
    "torchao_bare": Way(lambda _: torchao_bare()),
    "packed": Way(lambda _: swap_linears(qwen(), PackedLinear)),
    "float8": Way(lambda _: swap_linears(qwen(), Float8Linear)),
}
WAYS = MERGING | FORWARD_ONLY


#: What adapts the linears, and what puts paths beside them: LoR2C here has given one path up for LoRA on linears.
CONFIGS: dict[str, Callable[..., Any]] = {
    "msplora": lambda **fields: MSPLoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, **fields),
    "lora2": lambda **fields: LoRA2Config(r=8, lora_alpha=64, target_modules=TARGETS, **fields),
    "lor2c": lambda **fields: LoR2CConfig(r=8, lora_alpha=16, injected_layers=[1], **fields),
}
ON_LINEARS = ("msplora", "lora2")


def adapted(way: Way, tmp_path: Path, method: str = "msplora", **fields: Any) -> Any:
    return put_in(way.build(tmp_path), method, **fields)


def put_in(base: nn.Module, method: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(base, CONFIGS[method](**fields))  # type: ignore[arg-type]


def trained(way: Way, tmp_path: Path, method: str = "msplora") -> tuple[Any, list[float]]:
    model = adapted(way, tmp_path, method).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(8):
        loss = model(**inputs(), labels=inputs()["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return model.eval(), losses


def dequantised(linear: nn.Module) -> Tensor:
    """The weight of a linear as its own forward applies it: column i is what the i-th unit vector gives."""
    base = copy.deepcopy(linear).train()
    with torch.no_grad():
        columns = base(torch.eye(base.in_features))
        return (columns - base(torch.zeros(1, base.in_features))).T


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", WAYS)
def test_a_fresh_adapter_changes_nothing(name: str, method: str, tmp_path: Path) -> None:
    base = WAYS[name].build(tmp_path)
    logits(base, inputs())  # some lay their weights out anew at the first call
    before = logits(base, inputs())
    model = put_in(base, method).eval()
    assert torch.equal(logits(model, inputs()), before)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", WAYS)
def test_gradients_are_those_of_the_dequantised_model(name: str, method: str, tmp_path: Path) -> None:
    model = adapted(WAYS[name], tmp_path, method, init_weights=False).train()
    same = qwen()
    for path, linear in same.named_modules():
        if type(linear) is nn.Linear and "lm_head" not in path:
            quantised = model.base_model.model.get_submodule(path)
            linear.weight.data = dequantised(getattr(quantised, "base_layer", quantised))
    plain = put_in(same, method, init_weights=False).train()
    for each in (model, plain):
        each(**inputs(), labels=inputs()["input_ids"]).loss.backward()
    parameters = {n: p for n, p in model.named_parameters() if model.prefix in n}
    wanted = dict(plain.named_parameters())
    assert parameters
    for path, parameter in parameters.items():
        assert parameter.dtype == torch.float32
        gradient, reference = parameter.grad, wanted[path].grad
        assert gradient is not None and reference is not None and reference.norm() > 0
        assert (gradient - reference).norm() < 2e-3 * reference.norm()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(parameters)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", WAYS)
def test_training_lowers_the_loss(name: str, method: str, tmp_path: Path) -> None:
    _, losses = trained(WAYS[name], tmp_path, method)
    assert losses[-1] < losses[0] - 0.1, losses


@pytest.mark.parametrize("method", ON_LINEARS)
@pytest.mark.parametrize("name", MERGING)
def test_merging_reports_the_error_that_it_makes(
    name: str, method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = trained(MERGING[name], tmp_path, method)
    expected = logits(model, inputs())
    with model.disable_adapter():
        moved = (expected - logits(model, inputs())).norm()
    layers = [m for m in model.modules() if isinstance(m, AdaptedLinear)]
    wanted = {id(m): dequantised(m.get_base_layer()) + m.get_delta_weight("default").detach() for m in layers}
    biases = [m.get_base_layer().bias.clone() for m in layers]

    with caplog.at_level(logging.WARNING, logger="ziggurat"):
        model.merge_adapter(safe_merge=True)
    merged = logits(model, inputs())
    assert (merged - expected).norm() < MERGING[name].close * moved
    assert not torch.equal(merged, expected)
    assert all(torch.equal(m.get_base_layer().bias, bias) for m, bias in zip(layers, biases, strict=True))

    errors = []
    for layer in layers:
        error = (dequantised(layer.get_base_layer()) - wanted[id(layer)]).norm() / layer.get_delta_weight(
            "default"
        ).norm()
        torch.testing.assert_close(torch.tensor(layer.requantisation_error), error.detach(), rtol=1e-2, atol=1e-5)
        errors.append(float(error.detach()))
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("ziggurat")]
    assert len(messages) == 1, "one line for the whole model"
    assert messages[0].startswith(f"merged into {len(layers)} ")
    figure = re.search(r"at most ([0-9.e+-]+)%", messages[0])
    assert figure is not None
    assert float(figure[1]) == pytest.approx(100 * max(errors), rel=0.1)

    model.unmerge_adapter()
    assert (logits(model, inputs()) - expected).norm() < MERGING[name].close * moved
    unloaded = model.merge_and_unload()
    assert not any(isinstance(m, AdaptedLinear) for m in unloaded.modules())
    assert (logits(unloaded, inputs()) - expected).norm() < MERGING[name].close * moved


@pytest.mark.parametrize("method", ON_LINEARS)
@pytest.mark.parametrize("name", FORWARD_ONLY)
@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_what_cannot_be_merged_refuses_whole(name: str, call: str, method: str, tmp_path: Path) -> None:
    model, _ = trained(FORWARD_ONLY[name], tmp_path, method)
    expected = logits(model, inputs())
    with pytest.raises(ValueError, match=r"Nothing can be merged into a \w+ weight \(.*layers\.0\..*unquantised model"):
        getattr(model, call)()
    assert torch.equal(logits(model, inputs()), expected)
    model.unmerge_adapter()
    bare = model.unload()
    assert not any(isinstance(m, AdaptedLinear) for m in bare.modules())
    assert torch.equal(logits(bare, inputs()), logits(FORWARD_ONLY[name].build(tmp_path), inputs()))


@pytest.mark.parametrize("name", WAYS)
def test_paths_beside_quantised_layers_save_reload_and_refuse_to_merge(name: str, tmp_path: Path) -> None:
    model, _ = trained(WAYS[name], tmp_path, "lor2c")
    expected = logits(model, inputs())
    assert sum(isinstance(m, PathLayer) for m in model.modules()) == 3
    assert [path for path, m in model.named_modules() if isinstance(m, AdaptedLinear) and m.adapters] == [
        f"base_model.model.model.layers.1.self_attn.{name}" for name in TARGETS
    ]
    with pytest.raises(ValueError, match="can't be merged into weights"):
        model.merge_and_unload()
    assert torch.equal(logits(model, inputs()), expected)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(WAYS[name].build(tmp_path), str(tmp_path / "adapter")).eval()
    logits(again, inputs())
    assert torch.equal(logits(again, inputs()), expected)


def test_bare_torchao_names_the_way_round(tmp_path: Path) -> None:
    model = adapted(FORWARD_ONLY["torchao_bare"], tmp_path)
    with pytest.raises(ValueError, match="TorchAoConfig"):
        model.merge_adapter()


def test_an_update_of_zero_has_no_relative_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(MERGING["hqq_4bit"], tmp_path)
    with caplog.at_level(logging.WARNING, logger="ziggurat"):
        model.merge_adapter()
    assert not [record for record in caplog.records if re.search("nan|inf", record.getMessage())]


@pytest.mark.parametrize("method", ON_LINEARS)
@pytest.mark.parametrize("name", ["bnb_4bit", "bnb_8bit", "hqq_4bit", "packed"])
def test_an_adapter_of_a_quantised_model_exports(name: str, method: str, tmp_path: Path) -> None:
    from ziggurat.export import export_model

    model, _ = trained(WAYS[name], tmp_path, method)
    written = export_model(model, tmp_path / "lora")
    assert written.modules == 8
    plain = PeftModel.from_pretrained(qwen(), str(tmp_path / "lora"))
    for path, layer in model.base_model.model.named_modules():
        if isinstance(layer, AdaptedLinear):
            same: Any = plain.base_model.model.get_submodule(path)
            assert_sums_agree(same.get_delta_weight("default"), layer.get_delta_weight("default"), WIDTH)
