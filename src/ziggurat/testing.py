"""The contract of a method as one function: `check_method(MyConfig())`."""

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from ziggurat.analysis.collect import collect
from ziggurat.errors import ConfigError, with_article
from ziggurat.export import export_model
from ziggurat.host.count import count
from ziggurat.host.linear import AdaptedLinear
from ziggurat.host.method import EVALUATION, Method, method_of, unique_specs
from ziggurat.host.method_layer import layers_of
from ziggurat.host.plain import lora_pairs
from ziggurat.host.saved.folder import load_adapter
from ziggurat.host.site import Site

#: (config at the site, site, tensors in float64 by key) -> the dense update (d_out, d_in) in float64.
Naive = Callable[[Any, Site, Mapping[str, Tensor]], Tensor]

TARGETS = ["q_proj", "v_proj", "up_proj"]
#: A fresh adapter may change the largest output by this share: LoRA-XS starts with entries of 1e-5.
NEUTRAL = 1e-4
#: Two ways to compute the same in float64, and in float32.
EXACT, CLOSE = 1e-10, 1e-4


@dataclass
class _Case:
    method: Method
    config: Any
    base: nn.Module
    inputs: dict[str, Any]
    naive: Naive | None

    def adapted(self) -> PeftModel:
        torch.manual_seed(0)
        return get_peft_model(copy.deepcopy(self.base), copy.deepcopy(self.config)).eval()

    def active(self) -> PeftModel:
        """A model whose adapter's trainable parameters are all random, so that it changes the model."""
        model = self.adapted()
        with torch.no_grad():
            for parameter in self.parameters(model).values():
                parameter.normal_(0.0, 0.2)
        return model

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {name: p for name, p in model.named_parameters() if f".{self.method.store}." in name}

    def outputs(self, model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        floating = {k: v.to(dtype) for k, v in self.inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
        out = model(**{**self.inputs, **floating})
        return out if isinstance(out, Tensor) else out[0]


def check_method(
    config: Any, model: nn.Module | None = None, *, inputs: dict[str, Any] | None = None, naive: Naive | None = None
) -> None:
    """Check the promises of every method for that of `config`, on `model`, which stays as it is.

    The forward is y = W x + B (A x) with the method's own pair, in float64; the pair's B A is `naive`'s dense update,
    where it is given. A fresh adapter changes nothing. Gradients reach every trainable parameter. `count`, and a model
    on the meta device, have as many trainable parameters as are built. Shared tensors are stored once, and an adapter
    that is loaded again gives bitwise the same outputs. Merging keeps the outputs and unmerging gives the weights back
    bitwise; the export to plain LoRA gives the same outputs in PEFT's own LoRA (both where the card says `merges`).

    `inputs` are the arguments of `model`'s forward, whose output is a tensor or has one first; for a language model of
    transformers they are made. Without `model` a Llama of two layers and width 16 is built, of which `TARGETS` are
    adapted, whatever modules the config names.

    Raises:
        AssertionError: a promise is broken; the text says which, where, and what was compared.
        ConfigError: no method is registered for `config`; it doesn't fit `model`; `inputs` are missing; `tensors` and
            `pair` don't fit each other, or end in an error.
    """
    method = method_of(config)
    if method is None or method.pair is None:
        raise ConfigError(f"{type(config).__name__} is no config of a registered method that has a pair.")
    if model is None:
        model = _small_llama()
        anywhere = {"exclude_modules": None, "layers_to_transform": None, "modules_to_save": None, "task_type": None}
        config = replace(config, target_modules=TARGETS, target_parameters=None, **anywhere)
    case = _Case(method, config, copy.deepcopy(model).float().eval(), inputs or _inputs(model), naive)
    with torch.random.fork_rng():
        _check_counts(case)
        assert collect(case.active()).components, "the analysis finds no part of the adapter."
        _check_neutral(case)
        _check_equation(case)
        _check_gradients(case)
        with tempfile.TemporaryDirectory() as folder:
            _check_reload(case, Path(folder))
        if method.card.merges:
            _check_merge(case)
            with tempfile.TemporaryDirectory() as folder:
                _check_export(case, Path(folder) / "lora")


def _check_counts(case: _Case) -> None:
    built = sum(p.numel() for p in case.parameters(case.adapted()).values())
    counted = count(case.base, case.config)
    assert counted == built, f"count: `tensors` gives {counted:,} trainable parameters, {built:,} were built."
    with torch.device("meta"):
        on_meta = get_peft_model(copy.deepcopy(case.base).to("meta"), copy.deepcopy(case.config))
    planned = sum(p.numel() for p in case.parameters(on_meta).values())
    assert planned == built, f"meta device: {planned:,} trainable parameters, {built:,} on the CPU."


@torch.no_grad()
def _check_neutral(case: _Case) -> None:
    _agree(case.outputs(case.adapted()), case.outputs(case.base), NEUTRAL, "a fresh adapter's outputs and the base's")
    changed = (case.outputs(case.active()) - case.outputs(case.base)).abs().max()
    assert changed > 0, "an adapter whose parameters are all random changes no output: does `pair` use them?"


@torch.no_grad()
def _check_equation(case: _Case) -> None:
    model = case.active().double()
    for path, layer in model.named_modules():
        if not isinstance(layer, AdaptedLinear) or "default" not in layer.adapters:
            continue
        config, site, tensors = layer.configs["default"], layer.sites["default"], layer.stored("default")
        assert case.method.pair is not None
        A, B = case.method.pair(config, site, tensors, EVALUATION)
        x = torch.randn(3, site.d_in, dtype=torch.float64)
        expected = layer.base_layer(x) + (x @ A.mT) @ B.mT
        _agree(layer(x), expected, EXACT, f"{path}: the layer's output and W x + B (A x) with its pair")
        if case.naive is not None:
            dense = case.naive(config, site, tensors)
            kind = with_article(type(dense).__name__)
            assert isinstance(dense, Tensor), f"{path}: `naive` returned {kind}, no tensor."
            _agree(B @ A, dense, EXACT, f"{path}: B A of `pair` and the dense update of `naive`")


def _check_gradients(case: _Case) -> None:
    model = case.active().train()
    out = case.outputs(model)
    (out - torch.randn_like(out)).square().mean().backward()
    for name, parameter in case.parameters(model).items():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached, f"no gradient reaches {name}: does `pair` use it? `trainable=False` freezes a tensor."


@torch.no_grad()
def _check_reload(case: _Case, folder: Path) -> None:
    model = case.active()
    model.save_pretrained(str(folder))
    config: Any = model.peft_config["default"]
    sites = {site.path: site for layer in layers_of(model) for site in layer.sites.values()}
    specs = unique_specs(case.method, config.at, sites)
    expected = sum(spec.size for spec in specs.values() if spec.seed is None)
    stored = load_file(folder / "adapter_model.safetensors")
    held = sum(tensor.numel() for name, tensor in stored.items() if f".{case.method.store}." in name)
    assert held == expected, (
        f"the file holds {held:,} parameters of the method; `tensors` asks for {expected:,}, each once."
    )
    again = PeftModel.from_pretrained(copy.deepcopy(case.base), str(folder)).eval()
    same = torch.equal(case.outputs(again), case.outputs(model))
    assert same, "an adapter that was saved and loaded again gives other outputs: is all that `pair` uses stored?"


@torch.no_grad()
def _check_merge(case: _Case) -> None:
    model = case.active().double()
    expected = case.outputs(model)
    model.merge_adapter()
    _agree(case.outputs(model), expected, 1e-8, "the outputs after merging and before")
    model.unmerge_adapter()
    assert torch.equal(case.outputs(model), expected), "unmerging doesn't give the outputs from before the merge back."
    _agree(case.outputs(model.merge_and_unload()), expected, 1e-8, "the outputs of `merge_and_unload` and before")


@torch.no_grad()
def _check_export(case: _Case, folder: Path) -> None:
    model = case.active()
    export_model(model, folder)
    model.save_pretrained(str(folder / "adapter"))
    without_weights = load_adapter(folder / "adapter", copy.deepcopy(case.base).to("meta"))
    pairs = lora_pairs(model)
    for path, (A, B) in lora_pairs(without_weights).items():
        same = torch.equal(A, pairs[path].A) and torch.equal(B, pairs[path].B)
        assert same, f"{path}: an adapter loaded for export, on a base without weights, has another pair."
    plain = PeftModel.from_pretrained(copy.deepcopy(case.base), str(folder)).eval()
    _agree(
        case.outputs(plain), case.outputs(model), CLOSE, "the outputs of the export in PEFT's LoRA and the adapter's"
    )


def _agree(value: Tensor, expected: Tensor, tolerance: float, subject: str) -> None:
    assert value.shape == expected.shape, f"{subject}: shapes {tuple(value.shape)} and {tuple(expected.shape)}."
    off, size = float((value - expected).abs().max()), float(expected.abs().max())
    assert off <= tolerance * size, (
        f"{subject} differ by {off:.3g}, of at most {size:.3g} (allowed: {tolerance:g} of it)."
    )


def _small_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **size))


def _inputs(model: nn.Module) -> dict[str, Any]:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is None:
        raise ConfigError(f"check_method knows no inputs for {type(model).__name__}: give inputs={{...}}.")
    ids = torch.randint(0, size, (2, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids}
