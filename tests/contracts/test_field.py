"""Faults that users reported: other heads, a second adapter on one base, references for DPO, merges at every step."""

import copy
import json
import logging
import os
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    MambaConfig,
    MambaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_CALLBACKS

import versions
import ziggurat
from contracts.like_lora import PAIRS
from contracts.test_training import _tokenizer
from methods_table import METHODS, logits, zoo_config
from ziggurat import LoR2CConfig, LoRA2Config, MSPLoraConfig, kit
from ziggurat.errors import ConfigError
from ziggurat.export import export_model
from ziggurat.kit import MethodConfig, low_rank, register
from zoo import ZOO

every_method = pytest.mark.parametrize("method", METHODS)
merging = pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.merges])
targeting = pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.takes_targets])
LLAMA = ZOO["llama"]


def active(method: str, base: nn.Module | None = None, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(base or LLAMA.build(), zoo_config(method, "llama", init_weights=False, **fields)).eval()


def hidden(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**LLAMA.inputs(), output_hidden_states=True).hidden_states[-1]


def factors(model: nn.Module, method: str) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if METHODS[method].prefix in n}


# Other heads


@versions.transformers_calls
@every_method
def test_a_body_loads_what_was_trained_with_a_head_and_back(method: str, tmp_path: Path) -> None:
    LLAMA.build().save_pretrained(str(tmp_path / "base"))
    with_head = active(method, AutoModelForCausalLM.from_pretrained(str(tmp_path / "base")))
    with_head.save_pretrained(str(tmp_path / "head"))
    body = AutoModel.from_pretrained(str(tmp_path / "head")).eval()
    assert torch.equal(hidden(body), hidden(with_head))
    without = AutoModel.from_pretrained(str(tmp_path / "base"))
    torch.manual_seed(0)
    adapted = get_peft_model(without, zoo_config(method, "llama", init_weights=False, task_type=None)).eval()
    adapted.save_pretrained(str(tmp_path / "body"))
    head = AutoModelForCausalLM.from_pretrained(str(tmp_path / "body")).eval()
    assert torch.equal(hidden(head), hidden(adapted))


@versions.transformers_calls
@every_method
def test_transformers_refuses_a_file_that_lacks_tensors(method: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    LLAMA.build().save_pretrained(str(tmp_path / "base"))
    active(method, AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))).save_pretrained(str(tmp_path / "cut"))
    path = tmp_path / "cut" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="lacks 1 of the"):
        AutoModelForCausalLM.from_pretrained(str(tmp_path / "cut"))


def test_layers_that_a_model_lacks_are_left_out(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=50, **sizes)
    targets = ["query", "dense"]  # the pooler's is a dense one, too
    pooled = BertForSequenceClassification(config)
    get_peft_model(pooled, MSPLoraConfig(target_modules=targets, init_weights=False)).save_pretrained(str(tmp_path))
    for base in (BertForTokenClassification(config), BertModel(config, add_pooling_layer=False)):
        loaded = PeftModel.from_pretrained(base, str(tmp_path))
        paths = {path for path, layer in loaded.named_modules() if hasattr(layer, "effective_pair")}
        assert len(paths) == 2 * 4 and not any("pooler" in path for path in paths)


def test_the_config_says_who_wrote_it_and_a_newer_form_is_refused(tmp_path: Path) -> None:
    active("msplora").save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text())
    assert written["ziggurat_version"] == ziggurat.__version__ and written["ziggurat_format"] == 2
    file.write_text(json.dumps(written | {"ziggurat_format": 3, "ziggurat_version": "9.9"}))
    with pytest.raises(ConfigError, match=r"ziggurat_format=3, written by ziggurat '9\.9'.*Install a newer ziggurat"):
        PeftModel.from_pretrained(LLAMA.build(), str(tmp_path))


# What is said before training


@targeting
def test_a_fused_mixer_reads_past_the_adapter(method: str) -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2, state_size=4))
    with pytest.raises(ConfigError, match=r"out_proj' of a mamba model.*takes no part"):
        get_peft_model(mamba, zoo_config(method, "llama", target_modules=["in_proj", "out_proj"]))


@targeting
def test_experts_that_stay_frozen_are_named(method: str, caplog: pytest.LogCaptureFixture) -> None:
    base = ZOO["mixtral"].build()
    fused = [p for name, p in base.named_parameters() if p.dim() == 3]
    if not fused:
        pytest.skip("this transformers keeps the experts as linear layers")
    share = sum(p.numel() for p in fused) / sum(p.numel() for p in base.parameters())
    with caplog.at_level(logging.WARNING):
        get_peft_model(base, zoo_config(method, "mixtral", target_modules="all-linear", r=1))
    assert "leaves" in caplog.text and "frozen that hold the experts" in caplog.text
    assert f": {100 * share:.0f}% of the model's parameters" in caplog.text


# A second adapter on one base


@every_method
def test_a_second_adapter_on_one_base_is_fresh(method: str, tmp_path: Path) -> None:
    base = LLAMA.build()
    before = logits(base, LLAMA.inputs())
    with torch.no_grad():
        for parameter in factors(active(method, base), method).values():
            parameter.add_(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = (
            get_peft_model(base, zoo_config(method, "llama", r=8, target_modules=["v_proj"]))
            if (METHODS[method].takes_targets)
            else get_peft_model(base, zoo_config(method, "llama", r=8))
        )
    assert torch.equal(logits(again.eval(), LLAMA.inputs()), before)
    alone = get_peft_model(LLAMA.build(), again.peft_config["default"])
    shapes = {name: p.shape for name, p in factors(again, method).items()}
    assert shapes == {name: p.shape for name, p in factors(alone, method).items()}
    again.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(LLAMA.build(), str(tmp_path)).eval()
    assert torch.equal(logits(loaded, LLAMA.inputs()), before)


@every_method
def test_one_config_serves_two_models(method: str) -> None:
    """Each is saved with the places that it has itself."""
    config = zoo_config(method, "llama")
    first = get_peft_model(LLAMA.build(), config)
    places = copy.deepcopy(first.peft_config["default"].sites)
    shallower = LLAMA.build().config
    shallower.num_hidden_layers = 2
    get_peft_model(AutoModelForCausalLM.from_config(shallower), config)
    assert places and first.peft_config["default"].sites == places


# References


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dylora"])  # which draws a rank for each pass
def test_dpo_goes_on_from_a_trained_adapter(method: str, tmp_path: Path) -> None:
    """The reference is the adapter as it was: where nothing has been learned yet, DPO's loss is ln 2."""
    trl = pytest.importorskip("trl")
    model = active(method)
    words = [f"w{i} w{i + 1}" for i in range(8)]
    rows = {"prompt": words, "chosen": [" w3 w4"] * 8, "rejected": [" w5 w6 w7"] * 8}
    run = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(
            str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False,
            logging_steps=1, disable_tqdm=True, learning_rate=1e-3, gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict(rows),
        processing_class=_tokenizer(),
    )  # fmt: skip
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=2e-3)
    assert "ref" in run.model.peft_config


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dylora"])
def test_grpo_goes_on_from_a_trained_adapter(method: str, tmp_path: Path) -> None:
    """The reference is the adapter as it was: where nothing has been learned yet, the KL divergence from it is 0."""
    trl = pytest.importorskip("trl")
    run = trl.GRPOTrainer(
        active(method),
        # Whatever was drawn, the two of a group differ.
        reward_funcs=lambda completions, **rest: [float(number % 2) for number in range(len(completions))],
        args=trl.GRPOConfig(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=2, max_completion_length=3,
            beta=0.1, report_to=[], use_cpu=True, bf16=False, logging_steps=1, disable_tqdm=True, learning_rate=1e-2,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(8)]}),
        processing_class=_tokenizer(),
    )  # fmt: skip
    run.train()
    first, second = [entry["kl"] for entry in run.state.log_history if "kl" in entry]
    assert abs(first) < 1e-6 < second


# Frozen adapters, and models that are none


def rows() -> Dataset:
    ids = torch.randint(5, 100, (16, 7), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    values = {"max_steps": 6, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(str(folder), **{**values, **fields})


def test_a_frozen_adapter_stays_as_it_is_and_the_trainer_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    config = LoRA2Config(r=4, target_rank=1, target_modules=LLAMA.targets, init_weights=False)
    get_peft_model(LLAMA.build(), config).save_pretrained(str(tmp_path / "adapter"))
    model = PeftModel.from_pretrained(LLAMA.build(), str(tmp_path / "adapter"), is_trainable=False)
    model.get_base_model().lm_head.requires_grad_(True)
    before = {name: p.clone() for name, p in factors(model, "lora2").items()}
    with caplog.at_level(logging.WARNING):
        Trainer(model, arguments(tmp_path / "run"), train_dataset=rows()).train()
    assert all(torch.equal(p, before[name]) for name, p in factors(model, "lora2").items())
    assert "no parameter of the adapter 'default' (LoRA²) trains" in caplog.text


@versions.saves_whole
def test_callbacks_pass_over_what_is_no_module(tmp_path: Path) -> None:
    """Every Trainer of a process gets them, SetFit's too, whose model is no torch module."""
    for config in (
        LoRA2Config(r=4, target_modules=LLAMA.targets),
        LoR2CConfig(r=4, merges=1),
        MSPLoraConfig(r=4, target_modules=LLAMA.targets, train_in_stages=True),
    ):
        get_peft_model(LLAMA.build(), config)
    trainer = Trainer(LLAMA.build(), arguments(tmp_path), train_dataset=rows())
    ours = [callback for callback in DEFAULT_CALLBACKS if callback.__module__.startswith("ziggurat.")]
    assert {kind.__name__ for kind in ours} >= {
        "TrainingWatch",
        "LoRA2Callback",
        "RestructureCallback",
        "StageCallback",
    }
    for callback in (kind() for kind in ours):
        for event in (name for name in dir(TrainerCallback) if name.startswith("on_")):
            trainer.state.max_steps = 4
            getattr(callback, event)(
                trainer.args, trainer.state, trainer.control, model=object(), logs={"loss": 1.0}, metrics={}
            )


def test_a_staged_run_that_fails_leaves_all_tiers_with_gradients(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("the disk is full")

    model = active("msplora", train_in_stages=True)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[Fails()])
    with pytest.raises(RuntimeError, match="the disk is full"):
        trainer.train()
    model.zero_grad()
    model(**LLAMA.inputs(), labels=LLAMA.inputs()["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in factors(model, "msplora").values())


# The structure travels with the state


@versions.saves_whole
def test_a_plain_state_dict_holds_the_structure() -> None:
    torch.manual_seed(0)
    trained = get_peft_model(LLAMA.build(), LoR2CConfig(r=4, merges=1, injections=1, init_weights=False)).eval()
    for step in range(20):
        trained.restructure(step, 20)
    expected = logits(trained, LLAMA.inputs())
    other = get_peft_model(LLAMA.build(), LoR2CConfig(r=4, merges=1, injections=1, init_weights=False)).eval()
    other.load_state_dict(trained.state_dict(), strict=True)
    assert torch.equal(logits(other, LLAMA.inputs()), expected)
    without = {name: t for name, t in trained.state_dict().items() if "_extra_state" not in name}
    with pytest.raises(RuntimeError, match="_extra_state"):
        other.load_state_dict(without, strict=True)


# Sums of adapters


def test_a_sum_of_classifiers_has_the_sum_of_their_heads() -> None:
    torch.manual_seed(0)
    bert = ZOO["bert"]
    config = zoo_config("msplora", "bert", init_weights=False)
    model = get_peft_model(bert.build(), config)
    model.add_adapter("second", zoo_config("msplora", "bert", init_weights=False))
    wrapper = model.get_base_model().classifier
    with torch.no_grad():
        for name in ("default", "second"):
            for parameter in wrapper.modules_to_save[name].parameters():
                parameter.add_(torch.randn_like(parameter))
    model.add_weighted_adapter(["default", "second"], [0.25, 0.75], "sum")
    first, second, summed = (wrapper.modules_to_save[name].weight for name in ("default", "second", "sum"))
    torch.testing.assert_close(summed, 0.25 * first + 0.75 * second)
    model.set_adapter("sum")
    assert wrapper.active_adapters == ["sum"]


def test_a_sum_may_have_a_rank_above_the_matrix_and_is_saved(tmp_path: Path) -> None:
    model = active("msplora", r=8)  # 2 x 8 is above k and v's 8 outputs
    model.add_adapter("second", zoo_config("msplora", "llama", r=8, init_weights=False))
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum")
    model.set_adapter("sum")
    expected = logits(model, LLAMA.inputs())
    model.save_pretrained(str(tmp_path), selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(LLAMA.build(), str(tmp_path / "sum")).eval()
    assert torch.equal(logits(loaded, LLAMA.inputs()), expected)


@pytest.mark.parametrize("method", ["msplora", "lora2"])
def test_a_sum_that_fails_leaves_no_adapter(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = active(method)
    model.add_adapter("second", zoo_config(method, "llama", init_weights=False))

    def fails(*args: Any) -> None:
        raise MemoryError("no room")

    for module in ("ziggurat.host.blend", "ziggurat.methods.msplora.model"):
        monkeypatch.setattr(f"{module}.blend_whole_modules", fails)
    for _ in range(2):
        with pytest.raises(MemoryError):
            model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum")
        assert "sum" not in model.peft_config
        assert not any(".sum." in name for name in factors(model, method))


# Merging


@merging
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_two_hundred_merges_leave_the_base_as_it_was(method: str, dtype: torch.dtype) -> None:
    """As TRL's weight syncs do: merge all, read all parameters, unmerge."""
    model = active(method, LLAMA.build().to(dtype))
    base = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    synced: dict[str, Tensor] = {}
    for _ in range(200 if dtype == torch.bfloat16 and not METHODS[method].kit else 3):
        model.merge_adapter()
        synced = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): p.clone()
            for name, p in model.named_parameters()
            if model.prefix not in name
        }
        model.unmerge_adapter()
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    served = LLAMA.build().to(dtype)
    served.load_state_dict(synced)
    assert torch.equal(logits(served, LLAMA.inputs()), logits(copy.deepcopy(model).merge_and_unload(), LLAMA.inputs()))
    assert not any(getattr(module, "_unmerged", None) is not None for module in model.modules())


@pytest.mark.parametrize("method", ["msplora", "lora2"])
def test_trls_own_weight_sync_leaves_the_base_as_it_was(method: str) -> None:
    generation = pytest.importorskip("trl.generation.vllm_generation").VLLMGeneration
    if not hasattr(generation, "_iter_named_params"):
        pytest.skip("this TRL merges within its trainer, not here")
    model = active(method, LLAMA.build().to(torch.bfloat16))
    base = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    sync = object.__new__(generation)  # its __init__ starts vLLM
    sync.model, sync._dist = model, SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: nullcontext())
    for _ in range(20):
        received = {name: p.clone() for name, p in sync._iter_named_params()}
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    served = LLAMA.build().to(torch.bfloat16)
    served.load_state_dict(received)
    assert torch.equal(logits(served, LLAMA.inputs()), logits(copy.deepcopy(model).merge_and_unload(), LLAMA.inputs()))


@merging
def test_a_merge_into_half_precision_rounds_once(method: str) -> None:
    """Its error is that of rounding the exact sum, for several adapters at once too."""
    model = active(method, LLAMA.build().to(torch.bfloat16))
    model.add_adapter("second", zoo_config(method, "llama", init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    exact = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            pairs = [module.effective_pair(adapter) for adapter in ("default", "second")]
            exact[name] = module.get_base_layer().weight.double() + sum(B.double() @ A.double() for A, B in pairs)
    model.merge_adapter()
    for name, wanted in exact.items():
        weight = model.get_submodule(name).get_base_layer().weight
        # The products are made in float32, so one in some thousand entries may round to the other side.
        assert (weight != wanted.to(torch.bfloat16)).float().mean() < 0.01


def test_a_disabled_forward_while_merged_leaves_nothing_merged() -> None:
    model = active("msplora")
    model.add_adapter("second", zoo_config("msplora", "llama"))
    model.merge_adapter(["default"])
    with model.disable_adapter():
        logits(model, LLAMA.inputs())
    model.set_adapter("second")
    model.delete_adapter("default")
    assert list(model.peft_config) == ["second"]


def test_a_pyramid_of_one_tier_is_exported(tmp_path: Path) -> None:
    model = active("msplora", tiers=[{"name": "all", "groups": 1, "r": 4}])
    expected = logits(model, LLAMA.inputs())
    export_model(model, tmp_path / "plain")
    loaded = PeftModel.from_pretrained(LLAMA.build(), str(tmp_path / "plain")).eval()
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    torch.testing.assert_close(logits(loaded, LLAMA.inputs()), expected)


@every_method
def test_a_pickle_is_refused_when_it_would_be_written(method: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="safe_serialization=True"):
        active(method).save_pretrained(str(tmp_path / "pickled"), safe_serialization=False)


@pytest.mark.parametrize("trl", [False, True], ids=["transformers", "trl"])
def test_a_trainers_own_model_card_keeps_how_to_load(trl: bool, tmp_path: Path) -> None:
    LLAMA.build().save_pretrained(str(tmp_path / "base"))
    model = active("msplora", AutoModelForCausalLM.from_pretrained(str(tmp_path / "base")))
    if trl:
        from trl import SFTConfig, SFTTrainer

        rows = Dataset.from_list([{"text": "a b c"}] * 2)
        args: Any = SFTConfig(output_dir=str(tmp_path / "run"), report_to=[], bf16=False)
        trainer: Any = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=_tokenizer())
    else:
        trainer = Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path / "run"), report_to=[]))
    for _ in range(2):
        trainer.save_model()
        trainer.create_model_card()
        card = (tmp_path / "run" / "README.md").read_text()
        assert card.count("## Loading this adapter") == 1 and "import ziggurat  # registers the method" in card
        assert ("TRL" in card) == trl


@pytest.mark.skipif(os.name == "nt", reason="no modes")
def test_the_umask_says_who_reads_the_weights(tmp_path: Path) -> None:
    from ziggurat.export import merge

    before = os.umask(0o027)
    try:
        LLAMA.build().save_pretrained(str(tmp_path / "base"))
        model = active("msplora", AutoModelForCausalLM.from_pretrained(str(tmp_path / "base")))
        model.save_pretrained(str(tmp_path / "adapter"))
        export_model(model, tmp_path / "plain")
        merge(tmp_path / "adapter", tmp_path / "merged")
    finally:
        os.umask(before)
    for folder in ("adapter", "plain", "merged"):
        files = [file for file in (tmp_path / folder).iterdir() if file.is_file()]
        assert {oct(file.stat().st_mode & 0o777) for file in files} == {"0o640"}, folder


# What is drawn once a pass


@versions.transformers_calls
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("method", "fields"), [("dylora", {}), ("adapterdrop", {"robust_drop": 3})])
def test_two_passes_before_one_backward_are_computed_again_as_they_were(
    method: str, fields: dict[str, Any], use_reentrant: bool
) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = active(method, **fields).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(5)
        inputs = LLAMA.inputs()
        losses = [model(**inputs, labels=inputs["input_ids"]).loss for _ in range(4)]
        sum(losses).backward()  # type: ignore[union-attr]
        return [p.grad.clone() for p in factors(model, method).values() if p.grad is not None]

    for wanted, computed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(computed, wanted)


# One call a step, in any loop


@versions.saves_whole
def test_one_call_a_step_does_what_each_adapter_needs() -> None:
    torch.manual_seed(0)
    model = get_peft_model(LLAMA.build(), LoRA2Config(r=4, target_rank=1, target_modules=LLAMA.targets))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs, total = LLAMA.inputs(), 10
    ziggurat.step(model, 0, total)
    for step in range(1, total + 1):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        ziggurat.step(model, step, total, optimizer)
        optimizer.zero_grad()
    assert sum(model.ranks().values()) == len(model.ranks())
    staged = active("msplora", train_in_stages=True)
    moved = []
    for step in range(3):
        ziggurat.step(staged, step, 3)
        staged.zero_grad()
        staged(**inputs, labels=inputs["input_ids"]).loss.backward()
        moved.append({n.rpartition("_")[2] for n, p in factors(staged, "msplora").items() if p.grad is not None})
    assert moved == [{"global"}, {"mid"}, {"layer"}]
    paths = active("lor2c", merges=2)
    for step in range(9):
        ziggurat.step(paths, step, 8)
    assert len(paths.peft_config["default"].structure["stacks"]["model.layers"]["spans"]) == 2


@dataclass
class CounterConfig(MethodConfig):
    """LoRA that counts the steps of its run."""


def test_a_run_of_a_method_of_ones_own_is_resumed_with_its_state(tmp_path: Path) -> None:
    def step(root: nn.Module, adapter: str, config: Any, step: int, total: int, optimizer: Any) -> None:
        root.__dict__["steps"] = [*root.__dict__.get("steps", ()), step]

    register(
        kit.Method(
            *("counter", CounterConfig),
            tensors=lambda config, site: low_rank(config.r, site.d_in, site.d_out, config.init_weights),
            pair=lambda config, site, t, context: kit.FactorPair(t["A"], t["B"]),
            card=kit.Card("Counter", "", "counts"),
            needs_steps=lambda config: True,
            step=step,
            run_state=lambda root: {"steps": torch.tensor(root.__dict__["steps"])},
            resume=lambda root, state: root.__dict__.update(steps=state["steps"].tolist()),
        )
    )
    try:
        fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        for checkpoint in (None, str(tmp_path / "checkpoint-2")):
            model = get_peft_model(LLAMA.build(), CounterConfig(r=2, target_modules=["q_proj"]))
            Trainer(model, arguments(tmp_path, **fields), train_dataset=rows()).train(resume_from_checkpoint=checkpoint)
            assert model.get_base_model().__dict__["steps"] == [0, 1, 2, 3, 4]
    finally:
        kit.unregister("counter")


def test_an_adapter_that_needs_steps_and_gets_none_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    from ziggurat.host.lifecycle import PATIENCE

    model, inputs = active("msplora", train_in_stages=True).train(), LLAMA.inputs()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(PATIENCE + 3):
            model(**inputs)
    assert caplog.text.count("without a call of ziggurat.step") == 1
    caplog.clear()
    other = active("msplora").train()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(PATIENCE + 3):
            other(**inputs)
    assert "ziggurat.step" not in caplog.text


# What LoRA's config says


@pytest.mark.parametrize("method", PAIRS)
def test_a_config_of_lora_becomes_one_of_the_method(method: str, tmp_path: Path) -> None:
    config_class = type(zoo_config(method, "llama"))
    lora = LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.25, use_rslora=True, bias="lora_only", target_modules=["q_proj"],
        layers_to_transform=[1, 2], exclude_modules=["v_proj"], task_type="CAUSAL_LM", init_lora_weights="gaussian",
    )  # fmt: skip
    config = config_class.from_lora(lora)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (4, 6, 0.25, True)
    assert config.bias == f"{METHODS[method].prefix}only" and config.init_weights == "gaussian"
    # Without biases, which some PEFTs can't save.
    model = get_peft_model(LLAMA.build(), config_class.from_lora(lora, bias="none"))
    adapted = "model.layers.{}.self_attn.q_proj" if METHODS[method].takes_targets else "model.layers.{}"
    assert sorted(model.base_model.targeted_module_names) == [adapted.format(n) for n in (1, 2)]
    with pytest.raises(ConfigError, match=r"can't follow LoRA's .*use_dora=True"):
        config_class.from_lora(LoraConfig(use_dora=True, init_lora_weights="pissa"))
    assert config_class.from_lora(lora, r=8).r == 8


@every_method
def test_rows_of_the_embedding_train_along(method: str, tmp_path: Path) -> None:
    model = active(method, trainable_token_indices=[7, 11]).train()
    inputs = LLAMA.inputs()
    inputs["input_ids"][:, :2] = torch.tensor([7, 11])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(LLAMA.build(), str(tmp_path)).eval()
    assert torch.equal(logits(loaded, inputs), logits(model.eval(), inputs))
    assert hasattr(loaded.get_base_model().model.embed_tokens, "token_adapter")
