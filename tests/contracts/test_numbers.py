"""Cases of daily work: half precision, empty batches, one row, one token, tied embeddings, shared layers."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from methods_table import METHODS, enlarge, logits, zoo_config
from tolerance import assert_models_agree
from ziggurat.errors import ConfigError
from zoo import ZOO

every_method = pytest.mark.parametrize("method", METHODS)
merging = pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.merges])
#: Method -> what the names of its first and of its last factor hold.
DOWN_AND_UP = {
    "lora2": (".U", ".u"),
    "lor2c": (".A", ".B"),
    "dylora": (".A", ".B"),
    "msplora": (":A_", ":B_"),
    "sharelora": (":A", ".B"),
    "tiedlora": (":A", ":B"),
    "aslora": (":A", ":B"),
}
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def adapted(method: str, model: str, base: nn.Module | None = None, **fields: object) -> PeftModel:
    torch.manual_seed(0)
    built = ZOO[model].build() if base is None else base
    return get_peft_model(built, zoo_config(method, model, init_weights=False, **fields)).eval()


def parameters_of(model: nn.Module, method: str) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if METHODS[method].prefix in n}


def learn(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of the sum of the outputs, which has one for any number of rows."""
    out = model(**inputs)
    (out if isinstance(out, Tensor) else out[0]).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@every_method
@halves
def test_a_half_precision_base_trains_float32_factors(method: str, dtype: torch.dtype) -> None:
    inputs = ZOO["llama"].inputs()
    exact = logits(enlarge(adapted(method, "llama"), method), inputs)
    model = enlarge(adapted(method, "llama", ZOO["llama"].build().to(dtype)), method)
    out = logits(model, inputs)
    assert out.dtype == dtype
    assert_models_agree(out.float(), exact, dtype=dtype, without=logits(ZOO["llama"].build(), inputs))
    before = {name: p.detach().clone() for name, p in parameters_of(model, method).items()}
    gradients = learn(model, ZOO["llama"].inputs())
    assert gradients
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for n, g in gradients.items() if n in before)
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    assert any(not torch.equal(p, before[name]) for name, p in parameters_of(model, method).items())
    assert all(torch.isfinite(p).all() for p in model.parameters())


@merging
@halves
def test_merging_into_half_precision(method: str, dtype: torch.dtype) -> None:
    model, inputs = adapted(method, "llama", ZOO["llama"].build().to(dtype)), ZOO["llama"].inputs()
    expected = logits(model, inputs).float()
    merged = model.merge_and_unload(safe_merge=True)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    without = logits(ZOO["llama"].build(), inputs)
    assert_models_agree(logits(merged, inputs).float(), expected, dtype=dtype, without=without)


@every_method
def test_factors_beyond_float16_beside_a_float16_base(method: str) -> None:
    """A x is 1e6 times as large as usual and B as much smaller: the sum fits in float16, what is between doesn't."""
    if method not in DOWN_AND_UP:
        pytest.skip("a nonlinearity stands between the factors, or they are frozen")
    model = adapted(method, "llama", ZOO["llama"].build().half())
    exact = logits(model, ZOO["llama"].inputs())
    down, up = DOWN_AND_UP[method]
    with torch.no_grad():
        for name, parameter in parameters_of(model, method).items():
            if down in name:
                parameter.mul_(1e6)
            elif up in name:
                parameter.mul_(1e-6)
    out = logits(model, ZOO["llama"].inputs())
    assert torch.isfinite(out).all()
    without = logits(ZOO["llama"].build(), ZOO["llama"].inputs())
    assert_models_agree(out.float(), exact.float(), dtype=torch.float16, without=without)


@merging
def test_a_merge_that_overflows_float16_is_refused(method: str) -> None:
    model = adapted(method, "llama", ZOO["llama"].build().half())
    with torch.no_grad():
        for parameter in parameters_of(model, method).values():
            parameter.mul_(1e8)
    before = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if "base_layer" in name)


@every_method
def test_an_adapter_on_the_meta_device(method: str) -> None:
    """Shapes without numbers, for planning: the same as those of a real one."""
    real = parameters_of(adapted(method, "bert"), method)
    with torch.device("meta"):
        base = ZOO["bert"].build()
    planned = parameters_of(adapted(method, "bert", base.to("meta")), method)
    assert {n: p.shape for n, p in planned.items()} == {n: p.shape for n, p in real.items()}
    assert all(p.is_meta for p in planned.values())


@every_method
@pytest.mark.parametrize("model", ["plain_list", "plain_experts"])
def test_an_empty_batch(method: str, model: str) -> None:
    """On models that take one; transformers' own can't reshape no rows into heads."""
    inputs = {name: value[:0] for name, value in ZOO[model].inputs().items()}
    expected = logits(ZOO[model].build(), inputs)
    tuned = adapted(method, model)
    out = logits(tuned, inputs)
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    gradients = learn(tuned, inputs)
    assert all((gradient == 0).all() for gradient in gradients.values())


@every_method
@pytest.mark.parametrize("model", ["llama", "bert"])
def test_one_row_and_one_token(method: str, model: str) -> None:
    tuned = adapted(method, model)
    ids = ZOO[model].inputs()["input_ids"][:, :3].clamp(min=5)
    whole = logits(tuned, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for row in range(2):
        alone = logits(tuned, {"input_ids": ids[row : row + 1], "attention_mask": torch.ones(1, 3, dtype=torch.long)})
        assert_models_agree(alone[0], whole[row])
    first = {"input_ids": ids[:1, :1], "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    token = logits(tuned, first)
    if model == "llama":  # causal: the first token doesn't see the others
        assert_models_agree(token[0, 0], whole[0, 0])
    assert not torch.equal(token, logits(ZOO[model].build(), first))
    assert all(torch.isfinite(gradient).all() for gradient in learn(tuned, first).values())


def tied_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = ZOO["llama"].build().config.to_dict() | {"tie_word_embeddings": True}
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


@every_method
def test_tied_embeddings_stay_tied(method: str, tmp_path: Path) -> None:
    tuned, inputs = adapted(method, "llama", tied_llama()), ZOO["llama"].inputs()
    expected = logits(tuned, inputs)
    tuned.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tied_llama(), str(tmp_path)).eval()
    assert torch.equal(logits(loaded, inputs), expected)
    bare = tuned.merge_and_unload() if METHODS[method].merges else tuned.unload()
    assert bare.lm_head.weight is bare.model.embed_tokens.weight
    if METHODS[method].merges:
        assert_models_agree(logits(bare, inputs), expected)


@every_method
def test_a_model_that_runs_one_layer_many_times(method: str, tmp_path: Path) -> None:
    """ALBERT: one layer, run four times. An adapter on it acts each time, and its gradient is the sum over them."""
    tuned, inputs = adapted(method, "albert"), ZOO["albert"].inputs()
    expected = logits(tuned, inputs)
    assert not torch.equal(expected, logits(ZOO["albert"].build(), inputs))
    tuned.save_pretrained(str(tmp_path))
    assert torch.equal(logits(PeftModel.from_pretrained(ZOO["albert"].build(), str(tmp_path)).eval(), inputs), expected)
    exact = adapted(method, "albert", ZOO["albert"].build().double()).double()
    name, parameter = next((n, p) for n, p in parameters_of(exact, method).items() if p.dim() == 2 and "_u" not in n)
    gradient = learn(exact, inputs)[name].flatten()
    place, step = int(gradient.abs().argmax()), 1e-6

    def total(shift: float) -> float:
        with torch.no_grad():
            parameter.view(-1)[place] += shift
            actual = float(exact(**inputs)[0].sum())
            parameter.view(-1)[place] -= shift
        return actual

    slope = (total(step) - total(-step)) / (2 * step)
    assert abs(slope - float(gradient[place])) <= 1e-4 * max(1.0, abs(slope))
    if METHODS[method].merges:
        merged = logits(tuned.merge_and_unload(), inputs)
        assert_models_agree(merged, expected)
    else:
        assert torch.equal(logits(tuned.unload(), inputs), logits(ZOO["albert"].build(), inputs))


def test_paths_of_one_layer_cannot_merge() -> None:
    with pytest.raises(ConfigError, match="merges=1, but 1 paths have at most 0 merges"):
        adapted("lor2c", "albert", merges=1)
