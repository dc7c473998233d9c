"""h_out = Layer(h_in) + scale B A h_in, against the equation written out, and the published parameter counts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from path_reference import add_paths, raw_pair
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from methods_table import logits
from ziggurat import LoR2CConfig
from ziggurat.host.paths.layer import path_of
from zoo import ZOO

EXACT = {"rtol": 1e-10, "atol": 1e-10}
SPANS = [(0, 2), (3, 3)]

FIRST_LAYER: dict[str, Callable[[nn.Module], nn.ModuleList]] = {
    "bert": lambda m: m.bert.encoder.layer,
    "roberta": lambda m: m.roberta.encoder.layer,
    "mpnet": lambda m: m.mpnet.encoder.layer,
    "deberta-v2": lambda m: m.deberta.encoder.layer,
    "llama": lambda m: m.model.layers,
    "gpt2": lambda m: m.transformer.h,
    "phi3": lambda m: m.model.layers,
    "vit": lambda m: next(s for s in m.modules() if isinstance(s, nn.ModuleList)),
    "plain_list": lambda m: m.blocks,
}


def both(model: str, **fields: Any) -> tuple[PeftModel, nn.Module, list[tuple[int, int, nn.Parameter, nn.Parameter]]]:
    """A float64 model with paths that do something, the same one with the equation in its place, and the factors."""
    torch.manual_seed(0)
    spans = fields.pop("spans", None)
    zoo = ZOO[model]
    config = LoR2CConfig(r=4, lora_alpha=6, init_weights=False, spans=spans, **fields)
    adapted = get_peft_model(zoo.build(), config).double().eval()
    layers = FIRST_LAYER[model](adapted.get_base_model())
    factors, dense = [], []
    for first, last in spans or [(n, n) for n in range(len(layers))]:
        a, b = raw_pair(path_of(layers[last]))
        factors.append((first, last, a, b))
        dense.append((first, last, (6 / 4) * b.detach() @ a.detach()))
    reference = zoo.build().double()
    add_paths(FIRST_LAYER[model](reference), dense)
    return adapted, reference, factors


def double_inputs(model: str) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in ZOO[model].inputs().items()}


@pytest.mark.parametrize("model", FIRST_LAYER)
@pytest.mark.parametrize("spans", [None, SPANS])
@pytest.mark.parametrize("share", [False, True])
def test_the_forward_is_the_equation(model: str, spans: list | None, share: bool) -> None:
    adapted, reference, _ = both(model, spans=spans, share=share)
    inputs = double_inputs(model)
    expected = logits(reference, inputs)
    torch.testing.assert_close(logits(adapted, inputs), expected, **EXACT)
    assert (expected - logits(ZOO[model].build().double(), inputs)).abs().max() > 1e-4


@pytest.mark.parametrize("model", ["t5", "bart"])
def test_two_stacks_have_their_own_paths(model: str) -> None:
    torch.manual_seed(0)
    stacks = list(ZOO[model].stacks)
    spans = {stacks[0]: [[0, 1]], stacks[1]: [[1, 1], [2, 4]]}
    adapted = get_peft_model(ZOO[model].build(), LoR2CConfig(r=4, lora_alpha=6, init_weights=False, spans=spans))
    adapted.double().eval()
    reference = ZOO[model].build().double()
    for stack, spans_of_stack in spans.items():
        layers = adapted.get_base_model().get_submodule(stack)
        pairs = [raw_pair(path_of(layers[last])) for _, last in spans_of_stack]
        dense = [(f, last, 1.5 * (b @ a).detach()) for (f, last), (a, b) in zip(spans_of_stack, pairs, strict=True)]
        add_paths(reference.get_submodule(stack), dense)
    inputs = double_inputs(model)
    torch.testing.assert_close(logits(adapted, inputs), logits(reference, inputs), **EXACT)


@pytest.mark.parametrize("model", ["roberta", "llama"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("spans", [None, SPANS])
def test_gradients_are_those_of_the_equation(model: str, checkpointing: bool | None, spans: list | None) -> None:
    """Of every A and B, and of what enters the first layer, also when layers are recomputed in the backward."""
    adapted, _, factors = both(model, spans=spans)
    reference = ZOO[model].build().double().requires_grad_(False)
    twins = [(f, last, a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_())
             for f, last, a, b in factors]  # fmt: skip
    add_paths(FIRST_LAYER[model](reference), [(f, last, 1.5 * b @ a) for f, last, a, b in twins])
    inputs = ZOO[model].inputs()
    labels = {"labels": torch.tensor([0, 1]) if model == "roberta" else inputs["input_ids"]}
    expected = reference(**inputs, **labels).loss
    expected.backward()
    adapted.train()
    for module in adapted.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if checkpointing is not None:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        adapted.enable_input_require_grads()
    loss = adapted(**inputs, **labels).loss
    torch.testing.assert_close(loss, expected, **EXACT)
    loss.backward()
    for (_, last, a, b), (_, _, a2, b2) in zip(factors, twins, strict=True):
        torch.testing.assert_close(a.grad, a2.grad, **EXACT, msg=lambda m, n=last: f"A of layer {n}: {m}")
        torch.testing.assert_close(b.grad, b2.grad, **EXACT)


def test_hidden_states_and_outputs_carry_the_path() -> None:
    adapted, reference, _ = both("llama", spans=SPANS)
    inputs = ZOO["llama"].inputs()
    with torch.no_grad():
        ours = adapted(**inputs, output_hidden_states=True).hidden_states
        theirs = reference(**inputs, output_hidden_states=True).hidden_states
    assert len(ours) == 5
    torch.testing.assert_close(ours[-1], theirs[-1], **EXACT)
    recorded = [state for state in ours if (state - theirs[-1]).abs().max() > 1e-8]
    assert len(recorded) == 4


class Keyword(nn.Module):
    """A layer that takes its hidden states by keyword, after another argument, and returns a tuple or a tensor."""

    def __init__(self, tensor: bool) -> None:
        super().__init__()
        self.linear, self.tensor = nn.Linear(8, 8), tensor

    def forward(self, *, bias: Tensor, hidden_states: Tensor) -> Any:
        out = hidden_states + torch.tanh(self.linear(hidden_states)) + bias
        return out if self.tensor else (out, bias)


class KeywordModel(nn.Module):
    def __init__(self, tensor: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Keyword(tensor) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            out = layer(bias=torch.ones(8, dtype=x.dtype), hidden_states=x)
            x = out if isinstance(out, Tensor) else out[0]
        return x


@pytest.mark.parametrize("tensor", [True, False])
def test_hidden_states_by_keyword(tensor: bool) -> None:
    torch.manual_seed(0)
    base = KeywordModel(tensor).double()
    reference = KeywordModel(tensor).double()
    reference.load_state_dict(base.state_dict())
    adapted = get_peft_model(base, LoR2CConfig(r=2, lora_alpha=2, init_weights=False, spans=[(0, 1), (2, 2)])).double()
    layers = adapted.get_base_model().layers
    dense = [(f, last, (raw_pair(path_of(layers[last]))[1] @ raw_pair(path_of(layers[last]))[0]))
             for f, last in [(0, 1), (2, 2)]]  # fmt: skip
    add_paths(reference.layers, dense)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(adapted(x), reference(x), **EXACT)


def test_published_parameter_counts() -> None:
    settings = RobertaConfig(vocab_size=40, max_position_embeddings=20, num_labels=2)
    with torch.device("meta"):
        counts = {
            share: get_peft_model(
                RobertaForSequenceClassification(settings), LoR2CConfig(r=8, share=share)
            ).path_counts()
            for share in (False, True)
        }
    assert counts[False] == {"stored": 147_456, "active": 147_456, "trained": 147_456}
    assert counts[True] == {"stored": 79_872, "active": 79_872, "trained": 79_872}
