"""Restructuring in training: the optimiser's parameters, changes, saved state, and runs that stop and go on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from path_reference import raw_pair
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

import versions
from methods_table import logits
from ziggurat import LoR2CConfig
from ziggurat.errors import ConfigError
from ziggurat.lowrank.spans import Span
from ziggurat.methods.lor2c.events import restructure
from ziggurat.methods.lor2c.paths import PathBank
from ziggurat.methods.lor2c.plan import StackState, schedule
from zoo import ZOO

pytestmark = versions.saves_whole

STACK = "bert.encoder.layer"
STEPS = 24
IM = {"merges": 2, "injections": 1}  # events before steps 2, 4 and 6 of 24; 1, 2 and 3 of 12


def adapted(seed: int = 0, **fields: Any) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(ZOO["bert"].build(), LoR2CConfig(**{"r": 4, "task_type": "SEQ_CLS", **IM, **fields}))


def bank(model: torch.nn.Module) -> PathBank:
    return next(m for m in model.modules() if isinstance(m, PathBank))


def state(model: torch.nn.Module) -> StackState:
    return bank(model).adapters["default"].structure[STACK]


def parameters_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if "lor2c_" in n}


def texts(count: int = 24) -> Dataset:
    ids = torch.randint(5, 100, (count, 7), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 3).tolist()})


def trainer(folder: Path, model: Any = None, seed: int = 0, **settings: Any) -> Trainer:
    settings = {
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "weight_decay": 0.1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **settings,
    }
    model = adapted(seed, lora_dropout=0.1) if model is None else model
    return Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=texts(), eval_dataset=texts(8))


class Recorder:
    """A plain loop that calls one method a step, and notes every parameter of the adapter before each step."""

    def __init__(self, steps: int = 10, total: int = STEPS, **fields: Any) -> None:
        self.model = adapted(**fields).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=2e-2, weight_decay=0.1)
        self.values: list[dict[str, Tensor]] = []
        self.got_gradient: list[set[str]] = []
        self.records: list[dict[str, Any]] = []
        inputs, labels = ZOO["bert"].inputs(), torch.tensor([0, 1])
        for step in range(steps):
            self.records += self.model.restructure(step, total, self.optimizer)
            self.values.append({n: p.detach().clone() for n, p in parameters_of(self.model).items()})
            self.model(**inputs, labels=labels).loss.backward()
            self.got_gradient.append({n for n, p in parameters_of(self.model).items() if p.grad is not None})
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.values.append({n: p.detach().clone() for n, p in parameters_of(self.model).items()})


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("events", [{"merges": 2, "injections": 0}, {"merges": 0, "injections": 2}, IM])
def test_what_acts_trains_and_what_does_not_is_left_alone(share: bool, events: dict[str, int]) -> None:
    run = Recorder(share=share, **events)
    in_optimiser = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert all(id(p) in in_optimiser for p in run.model.parameters() if p.requires_grad)
    assert all(p.requires_grad for p in parameters_of(run.model).values())
    moved_at = {record["step"] for record in run.records}
    assert moved_at == {event.step for event in schedule(events["merges"], events["injections"], STEPS)}
    for step, got in enumerate(run.got_gradient):
        for name, before in run.values[step].items():
            after = run.values[step + 1][name]
            if name in got:
                assert not torch.equal(after, before) or step == 0, (step, name)
            elif step + 1 not in moved_at:  # only an event may copy weights
                assert torch.equal(after, before), (step, name)
    assert len(run.got_gradient[-1]) < len(parameters_of(run.model))
    remembered = {n for n, p in parameters_of(run.model).items() if p in run.optimizer.state}
    assert remembered == run.got_gradient[-1]


def test_an_injected_pair_starts_fresh_and_its_path_ends() -> None:
    run = Recorder(merges=0, injections=1, steps=9)  # the event is before step 6
    layer = run.records[0]["injected"]
    path = {n for n in parameters_of(run.model) if f"layer.{layer}.residual_path" in n}
    linear = {n for n in parameters_of(run.model) if f"layer.{layer}.attention" in n}
    assert (len(path), len(linear)) == (2, 4)
    assert all(path <= got and not linear & got for got in run.got_gradient[:6])
    assert all(linear <= got and not path & got for got in run.got_gradient[6:])
    assert all(run.optimizer.state[p]["step"] == 3 for n, p in parameters_of(run.model).items() if n in linear)
    shapes = sorted(tuple(p.shape) for n, p in parameters_of(run.model).items() if n in linear)
    assert shapes == [(2, 16), (2, 16), (16, 2), (16, 2)]  # rank r / 2: the budget of 2 r d stays


@pytest.mark.parametrize("keep", ["lower", "richer"])
@pytest.mark.parametrize("share", [False, True])
def test_a_merged_path_goes_on_with_the_kept_weights_and_moments(keep: str, share: bool) -> None:
    model = adapted(merges=1, injections=0, keep=keep, share=share, init_weights=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(**ZOO["bert"].inputs(), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    members = bank(model).members[STACK]
    pairs = {n: [t.detach().clone() for t in raw_pair(path)] for n, path in members.items()}
    moments = {n: optimizer.state[p.stores["default"]["B"]]["exp_avg"].clone() for n, p in members.items()}
    (record,) = model.restructure(6, STEPS, optimizer)
    (low, _), (high, _) = record["merged"]
    kept = record["kept"][0]
    sums = {n: torch.linalg.svdvals((b @ a).double()).sum() for n, (a, b) in pairs.items()}
    assert kept == (low if keep == "lower" or sums[low] >= sums[high] else high)
    after = raw_pair(members[high])
    assert all(torch.equal(item, other) for item, other in zip(after, pairs[kept], strict=True))
    assert torch.equal(optimizer.state[members[high].stores["default"]["B"]]["exp_avg"], moments[kept])
    assert members[low].stores["default"]["B"] not in optimizer.state
    assert Span(low, high) in state(model).spans
    if share:
        assert raw_pair(members[low]).A is raw_pair(members[high]).A


def test_a_span_grows_until_the_limit_and_the_rest_is_said() -> None:
    model = adapted(merges=3, injections=0, init_weights=False)
    for step in range(7):
        restructure(model, step, STEPS)
    assert state(model) == StackState((Span(0, 3),))
    stuck = adapted(merges=2, injections=1, max_span=2, spans=[(0, 0), (1, 1), (2, 2), (3, 3)], init_weights=False)
    log = [r for step in range(7) for r in stuck.restructure(step, STEPS)]
    assert all(len(range(first, last + 1)) <= 2 for first, last in state(stuck).spans)
    assert len(log) == 3
    assert all("nothing to" in r["reason"] for r in log if "stack" not in r)


def test_counts_are_honest() -> None:
    model = adapted()
    d, r = 16, 4
    paths, linears = 4 * 2 * d * r, 4 * 2 * (2 * d * r // 2)
    assert model.path_counts() == {"stored": paths + linears, "active": paths, "trained": paths}
    for step in range(7):
        model.restructure(step, STEPS)
    left = len(state(model).spans) * 2 * d * r + 2 * (2 * d * r // 2)
    assert model.path_counts() == {"stored": paths + linears, "active": left, "trained": left}
    model.base_model.set_requires_grad("default", False)
    assert model.path_counts()["trained"] == 0


def test_the_trainer_does_all_events_by_itself_and_logs_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(tmp_path, save_steps=12)
    run.train()
    shown = " ".join(capsys.readouterr().err.split())
    for event in ("merge at step 1 of 12", "inject at step 2 of 12", "merge at step 3 of 12"):
        assert shown.count(event) == 1
    saved = tmp_path / "checkpoint-12"
    log = json.loads((saved / "lor2c_events.json").read_text())
    assert [(r["step"], r["kind"]) for r in log] == [(1, "merge"), (2, "inject"), (3, "merge")]
    assert all(set(r) >= {"scores", "candidates", "reason", "before", "after", "parameters"} for r in log)
    assert len(log[0]["scores"]) == 4
    assert (saved / "lor2c_events.svg").read_text().startswith("<svg")
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["structure"] == {"stacks": log[-1]["after"], "done": 3}
    assert config["spans"] is None
    loaded = PeftModel.from_pretrained(ZOO["bert"].build(), str(saved)).eval()
    inputs = ZOO["bert"].inputs()
    assert state(loaded) == state(run.model)
    assert torch.equal(logits(loaded, inputs), logits(run.model.eval(), inputs))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder)
    run.train()
    return run, folder


@pytest.mark.parametrize("stopped", [1, 2, 3])
def test_a_run_stopped_in_the_middle_of_restructuring_resumes_bitwise(
    stopped: int, whole: tuple[Trainer, Path], tmp_path: Path
) -> None:
    run, folder = whole
    resumed = trainer(tmp_path, seed=1, save_steps=12)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{stopped}"))
    assert state(resumed.model) == state(run.model)
    after = dict(resumed.model.named_parameters())
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, after[name]) or ("lor2c_" not in name and not parameter.requires_grad), name
    logs = [m.peft_config["default"].log for m in (run.model, resumed.model)]
    assert logs[0] == logs[1]
    moments = [t.optimizer.state_dict()["state"] for t in (run, resumed)]
    assert moments[0].keys() == moments[1].keys()
    for index, kept in moments[0].items():
        assert all(torch.equal(value, moments[1][index][name]) for name, value in kept.items())


def test_the_best_checkpoint_brings_its_structure_back(tmp_path: Path) -> None:
    """Metric: the evaluation's loss, forced to be best before the second event."""
    run = trainer(tmp_path, load_best_model_at_end=True, metric_for_best_model="loss", eval_strategy="steps",
                  eval_steps=2, save_steps=2)  # fmt: skip
    evaluate = run.evaluate
    run.evaluate = lambda *a, **k: {**evaluate(*a, **k), "eval_loss": abs(run.state.global_step - 2.0)}
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    assert len(state(run.model).spans) == 3
    assert state(run.model).injected == ()
    run.save_model(str(tmp_path / "best"))
    inputs = ZOO["bert"].inputs()
    for folder in (run.state.best_model_checkpoint, tmp_path / "best"):
        loaded = PeftModel.from_pretrained(ZOO["bert"].build(), str(folder)).eval()
        assert state(loaded) == state(run.model)
        assert torch.equal(logits(loaded, inputs), logits(run.model.eval(), inputs))


def test_the_users_config_serves_for_a_second_model() -> None:
    config = LoR2CConfig(r=4, **IM)
    first = get_peft_model(ZOO["bert"].build(), config)
    for step in range(7):
        first.restructure(step, STEPS)
    assert config.structure is None
    assert config.log == []
    second = get_peft_model(ZOO["bert"].build(), config)
    assert len(state(second).spans) == 4


@pytest.mark.parametrize("share", [False, True])
def test_a_restructured_adapter_reloads_everywhere(share: bool, tmp_path: Path) -> None:
    model, inputs = adapted(share=share, init_weights=False), ZOO["bert"].inputs()
    for step in range(7):
        model.restructure(step, STEPS)
    expected = logits(model.eval(), inputs)
    model.save_pretrained(str(tmp_path))
    for low in (False, True):
        loaded = PeftModel.from_pretrained(ZOO["bert"].build(), str(tmp_path), low_cpu_mem_usage=low).eval()
        assert torch.equal(logits(loaded, inputs), expected)
    native = ZOO["bert"].build()
    native.load_adapter(str(tmp_path))
    assert state(native) == state(model)
    assert torch.equal(logits(native.eval(), inputs), expected)
    fresh = adapted(seed=5, share=share)
    fresh.load_adapter(str(tmp_path), "default")
    assert torch.equal(logits(fresh.eval(), inputs), expected)
    loaded.save_pretrained(str(tmp_path / "again"))
    first, other = (load_file(p / "adapter_model.safetensors") for p in (tmp_path, tmp_path / "again"))
    assert first.keys() == other.keys()
    assert all(torch.equal(first[name], other[name]) for name in first)


def test_a_loaded_adapter_goes_on_and_its_config_says_so(tmp_path: Path) -> None:
    model = adapted()
    model.restructure(2, STEPS)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(ZOO["bert"].build(), str(tmp_path), is_trainable=True)
    assert [record["step"] for step in range(7) for record in loaded.restructure(step, STEPS)] == [4, 6]
    loaded.save_pretrained(str(tmp_path / "later"))
    saved = json.loads((tmp_path / "later" / "adapter_config.json").read_text())["structure"]
    log = json.loads((tmp_path / "later" / "lor2c_events.json").read_text())
    assert saved == {"stacks": log[-1]["after"], "done": 3}


def test_damaged_or_foreign_structures_are_refused(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(ConfigError, match="Leave structure out"):
        adapted(structure={"stacks": {STACK: {"spans": [[0, 2], [1, 3]], "injected": []}}, "done": 0})
    with pytest.raises(ConfigError, match="needs parameters at layers"):
        bank(model).set_structure("default", {STACK: StackState((Span(0, 9),))})
    with pytest.raises(ConfigError, match=r"names the stack 'elsewhere'"):
        bank(model).set_structure("default", {"elsewhere": StackState((Span(0, 0),))})
    weights = {"base_model.model.lor2c_structure": torch.zeros(4, dtype=torch.uint8)}
    with pytest.raises(ConfigError, match="isn't the JSON"):
        model.base_model._remap_adapter_state_dict_for_load(model, model.peft_config["default"], "default", weights)
