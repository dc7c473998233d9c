"""Exports and merges of models whose weights are shared, have grown, or hide behind a name: all compute the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaForSequenceClassification,
)

import versions
from commands import main
from contracts.test_numbers import tied_llama
from methods_table import METHODS, logits, zoo_config
from tolerance import assert_models_agree
from word_tokenizer import word_tokenizer
from ziggurat import LoR2CConfig, MSPLoraConfig
from ziggurat.export import export, export_model, merge
from zoo import ZOO

merging = pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.merges])
LLAMA = ZOO["llama"]


def adapted(base: Any, config: Any) -> PeftModel:
    """`base`, saved at `base.name_or_path`, with an adapter whose trainable parameters all differ from the base's."""
    torch.manual_seed(0)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and METHODS[config.method.name].prefix not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def stored(base: Any, folder: Path, auto: Any, **loading: Any) -> Any:
    base.save_pretrained(str(folder))
    return auto.from_pretrained(str(folder), **loading).eval()


# Tied embeddings


@merging
def test_a_merge_into_a_tied_head_leaves_the_embedding_alone(method: str, tmp_path: Path) -> None:
    base = stored(tied_llama(), tmp_path / "base", AutoModelForCausalLM)
    model = adapted(base, zoo_config(method, "llama", target_modules=["q_proj", "lm_head"], init_weights=False))
    expected = logits(model, LLAMA.inputs())
    model.save_pretrained(str(tmp_path / "adapter"))
    model.merge_adapter()
    assert_models_agree(logits(model, LLAMA.inputs()), expected)
    model.unmerge_adapter()
    assert base.get_output_embeddings().base_layer.weight is base.get_input_embeddings().weight
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged")).eval()
    assert_models_agree(logits(merged, LLAMA.inputs()), expected)
    assert merged.config.tie_word_embeddings is False
    for serving in (False, True):
        written = export(tmp_path / "adapter", tmp_path / f"plain-{serving}", serving=serving)
        plain = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(str(tmp_path / "base")), str(written.folder)
        ).eval()
        assert_models_agree(logits(plain, LLAMA.inputs()), expected)


def test_the_command_merges_pefts_own_lora_of_a_tied_head(tmp_path: Path) -> None:
    base = stored(tied_llama(), tmp_path / "base", AutoModelForCausalLM)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    expected = logits(model, LLAMA.inputs())
    model.save_pretrained(str(tmp_path / "adapter"))
    assert main("merge", str(tmp_path / "adapter"), str(tmp_path / "merged")) == 0
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged")).eval()
    assert_models_agree(logits(merged, LLAMA.inputs()), expected)


@pytest.mark.parametrize("config", [MSPLoraConfig, LoraConfig])
def test_a_tied_head_whose_rows_train_is_merged_with_them(config: Any, tmp_path: Path) -> None:
    base = stored(tied_llama(), tmp_path / "base", AutoModelForCausalLM)
    fields = {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [5, 7], "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    model = get_peft_model(base, config(r=4, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = {"input_ids": torch.tensor([[5, 7, 3, 2]])}
    expected = logits(model, inputs)
    model.save_pretrained(str(tmp_path / "adapter"))
    if config is MSPLoraConfig:  # PEFT merges its own past the rows
        model.merge_adapter()
        assert_models_agree(logits(model, inputs), expected)
        model.unmerge_adapter()
        assert_models_agree(logits(model, inputs), expected)
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged")).eval()
    assert_models_agree(logits(merged, inputs), expected)


def test_an_adapter_of_another_size_is_told_so_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = stored(tied_llama(), tmp_path / "base", AutoModelForCausalLM)
    base.resize_token_embeddings(base.config.vocab_size + 3, mean_resizing=False)
    fields = {"target_modules": ["lm_head"], "trainable_token_indices": [5], "task_type": "CAUSAL_LM"}
    get_peft_model(base, LoraConfig(r=4, **fields)).save_pretrained(str(tmp_path / "adapter"))  # without the embedding
    assert main("merge", str(tmp_path / "adapter"), str(tmp_path / "merged")) == 2
    assert "doesn't fit its base model: base_model.model.lm_head" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "query"), [("t5", "q"), ("bart", "q_proj")])
def test_a_merge_into_the_tied_head_of_an_encoder_with_a_decoder(model: str, query: str, tmp_path: Path) -> None:
    base = stored(ZOO[model].build(), tmp_path / "base", AutoModelForSeq2SeqLM)
    tuned = adapted(base, zoo_config("msplora", model, target_modules=[query, "lm_head"], init_weights=False))
    expected = logits(tuned, ZOO[model].inputs())
    tuned.merge_and_unload().save_pretrained(str(tmp_path / "merged"))
    merged = AutoModelForSeq2SeqLM.from_pretrained(str(tmp_path / "merged")).eval()
    assert_models_agree(logits(merged, ZOO[model].inputs()), expected)


@versions.saves_whole
@pytest.mark.parametrize("method", METHODS)
def test_a_head_trained_whole_on_tied_embeddings_is_merged(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "adapterdrop":
        pytest.skip("it can't be merged")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = stored(tied_llama(), tmp_path / "base", AutoModelForCausalLM)
    model = adapted(base, zoo_config(method, "llama", modules_to_save=["lm_head"], init_weights=False))
    expected = logits(model, LLAMA.inputs())
    model.save_pretrained(str(tmp_path / "adapter"))
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), trust_remote_code=True).eval()
    assert_models_agree(logits(merged, LLAMA.inputs()), expected)
    assert merged.config.tie_word_embeddings is False


# A vocabulary that has grown


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [100, 102]},
    ],
    ids=["beside", "head adapted", "trained whole", "rows trained"],
)
def test_grown_embeddings_go_along(fields: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    made = tied_llama() if tied else LLAMA.build()
    rows = made.config.vocab_size + 3
    base = stored(made, tmp_path / "base", AutoModelForCausalLM)
    base.resize_token_embeddings(rows, mean_resizing=False)
    inputs = {"input_ids": torch.tensor([[5, rows - 1, 7, rows - 3]])}
    model = adapted(base, MSPLoraConfig(r=4, init_weights=False, task_type="CAUSAL_LM", **fields))
    expected = logits(model, inputs)
    model.save_pretrained(str(tmp_path / "adapter"))

    def loaded(folder: Path) -> Tensor:
        fresh = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
        fresh.resize_token_embeddings(rows, mean_resizing=False)
        return logits(PeftModel.from_pretrained(fresh, str(folder)).eval(), inputs)

    assert_models_agree(loaded(tmp_path / "adapter"), expected)
    assert_models_agree(loaded(export(tmp_path / "adapter", tmp_path / "from-folder").folder), expected)
    assert_models_agree(loaded(export_model(model, tmp_path / "from-memory").folder), expected)
    assert main("merge", str(tmp_path / "adapter"), str(tmp_path / "merged")) == 0
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged")).eval()
    assert_models_agree(logits(merged, inputs), expected)


def test_a_grown_export_with_its_tokenizer_loads_by_the_auto_class(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(map(str, range(50)), unk_token="<unk>")
    base = stored(LLAMA.build(), tmp_path / "base", AutoModelForCausalLM)
    tokenizer.add_tokens([f"<new{n}>" for n in range(base.config.vocab_size + 2 - len(tokenizer))])
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = adapted(base, MSPLoraConfig(r=4, target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM"))
    inputs = {"input_ids": torch.tensor([[5, len(tokenizer) - 1]])}
    export_model(model, tmp_path / "plain", tokenizer=tokenizer)
    plain = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "plain")).eval()
    assert_models_agree(logits(plain, inputs), logits(model, inputs))


# Heads of any number of labels


def _distilbert(labels: int) -> Any:
    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=100, dim=16, hidden_dim=32, n_heads=2, n_layers=2, num_labels=labels)
    )


def _tokens(labels: int) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    return BertForTokenClassification(BertConfig(vocab_size=100, num_labels=labels, **sizes))


@pytest.mark.parametrize("labels", [1, 2, 4])
@pytest.mark.parametrize(
    ("build", "auto", "task", "targets"),
    [
        (_distilbert, AutoModelForSequenceClassification, "SEQ_CLS", ["q_lin", "v_lin"]),
        (_tokens, AutoModelForTokenClassification, "TOKEN_CLS", ["query", "value"]),
    ],
    ids=["texts", "tokens"],
)
def test_the_saved_head_says_how_many_labels(
    build: Callable[[int], Any], auto: Any, task: str, targets: list[str], labels: int, tmp_path: Path
) -> None:
    # The checkpoint's own head has three labels.
    base = stored(build(3), tmp_path / "base", auto, num_labels=labels, ignore_mismatched_sizes=True)
    model = adapted(base, MSPLoraConfig(r=4, target_modules=targets, init_weights=False, task_type=task))
    expected = logits(model, LLAMA.inputs())
    model.save_pretrained(str(tmp_path / "adapter"))
    assert main("export", str(tmp_path / "adapter"), str(tmp_path / "plain")) == 0
    assert main("merge", str(tmp_path / "adapter"), str(tmp_path / "merged")) == 0
    merged = auto.from_pretrained(str(tmp_path / "merged")).eval()
    assert merged.config.num_labels == labels
    assert_models_agree(logits(merged, LLAMA.inputs()), expected)
    fresh = auto.from_pretrained(str(tmp_path / "base"), num_labels=labels, ignore_mismatched_sizes=True)
    plain = PeftModel.from_pretrained(fresh, str(tmp_path / "plain")).eval()
    assert_models_agree(logits(plain, LLAMA.inputs()), expected)


@versions.saves_whole
def test_a_path_around_layers_of_a_classifier_on_llama_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    LLAMA.build().save_pretrained(str(tmp_path / "base"))
    base = LlamaForSequenceClassification.from_pretrained(str(tmp_path / "base"), num_labels=3)
    model = adapted(base, LoR2CConfig(r=4, init_weights=False, task_type="SEQ_CLS"))
    model.save_pretrained(str(tmp_path / "adapter"))
    assert main("merge", str(tmp_path / "adapter"), str(tmp_path / "served")) == 0
    served = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "served"), trust_remote_code=True)
    assert_models_agree(logits(served.eval(), LLAMA.inputs()), logits(model, LLAMA.inputs()))


# Names that PEFT reads as experts


def _qwen3_moe() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 16, "head_dim": 8}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0, 2]}
    config = transformers.Qwen3MoeConfig(vocab_size=100, **sizes, **heads, **experts)
    return transformers.Qwen3MoeForCausalLM(config).eval()


def _deepseek() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 16}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    ranks: dict[str, Any] = {"kv_lora_rank": 8, "q_lora_rank": 8}
    widths: dict[str, Any] = {"qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 4}
    experts: dict[str, Any] = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    dense: dict[str, Any] = {"first_k_dense_replace": 1, "n_shared_experts": 1}
    config = transformers.DeepseekV3Config(vocab_size=100, **sizes, **heads, **ranks, **widths, **experts, **dense)
    return transformers.DeepseekV3ForCausalLM(config).eval()


@pytest.mark.parametrize("serving", [False, True], ids=["plain", "serving"])
@pytest.mark.parametrize(
    "targets",
    [
        ["gate_proj", "up_proj", "down_proj"],
        ["o_proj", "up_proj"],
        r".*layers\.[01]\..*(gate_proj|o_proj)",
        ["layers.0.mlp.down_proj", "q_proj"],
        "all-linear",
    ],
    ids=["names", "one of two", "regex", "path", "all-linear"],
)
@pytest.mark.parametrize("build", [_qwen3_moe, _deepseek])
def test_dense_layers_and_shared_experts_beside_fused_ones(
    build: Callable[[], Any], targets: Any, serving: bool, tmp_path: Path
) -> None:
    if build is _deepseek and isinstance(targets, list) and "q_proj" in targets:
        targets = ["layers.0.mlp.down_proj", "q_b_proj"]
    base = build()
    before = logits(base, LLAMA.inputs())
    model = adapted(base, MSPLoraConfig(r=4, lora_alpha=32, target_modules=targets, init_weights=False))
    expected = logits(model, LLAMA.inputs())
    export_model(model, tmp_path / "plain", serving=serving)
    plain = PeftModel.from_pretrained(build(), str(tmp_path / "plain")).eval()
    assert_models_agree(logits(plain, LLAMA.inputs()), expected)
    assert not torch.allclose(before, expected, rtol=1e-2, atol=1e-2)
