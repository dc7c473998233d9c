"""Spectra recorded by a real Trainer, logged, kept in a run, read back and drawn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import VeraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from methods_table import METHODS
from ziggurat.analysis import collect, figures, measures
from ziggurat.analysis.trace import record_spectra, scalars, series, top_values
from ziggurat.errors import ConfigError
from zoo import ZOO


def trainer_of(model: Any, folder: Path, **fields: Any) -> Trainer:
    rows = [{"input_ids": [5, 6, 7 + n % 3], "attention_mask": [1, 1, 1], "labels": n % 3} for n in range(12)]
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, num_train_epochs=2, learning_rate=1e-2,
        disable_tqdm=True, save_strategy="no", logging_steps=1000, seed=0, **{"report_to": "none", **fields},
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows))


def adapted(method: str) -> Any:
    torch.manual_seed(0)
    return get_peft_model(ZOO["bert"].build(), METHODS[method].config(ZOO["bert"]))


class Seen(TrainerCallback):
    """What a reporter (TensorBoard, W&B) is handed."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.names |= set(logs or {})


@pytest.mark.parametrize("method", ["msplora", "lora2", "lor2c"])
def test_every_epoch_is_recorded_and_the_last_is_the_adapter(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    trainer = trainer_of(model, tmp_path)
    reporter = Seen()
    trainer.add_callback(reporter)
    record_spectra(trainer)
    trainer.train()
    actual = top_values(trainer.state.log_history)
    collected = collect(model)
    assert set(actual) == set(collected.stored_parts)
    for part, (epochs, values) in actual.items():
        assert list(epochs) == [1, 2]
        expected = measures.mean_spectrum(collected, part, top=len(values))
        np.testing.assert_allclose(values[:, -1], expected, rtol=1e-6)
    assert {f"spectra/{part}/effective_rank" for part in actual} <= reporter.names
    assert set(series(trainer.state.log_history, "norm")) == set(actual)


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    """Its event files, as written by the Trainer's own reporter and read by TensorBoard itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = adapted("msplora")
    trainer = trainer_of(model, tmp_path, report_to="tensorboard")
    record_spectra(trainer)
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(file.parent)).Reload()
    logged = {name.removeprefix("train/"): read.Scalars(name) for name in read.Tags()["scalars"]}
    expected = scalars(collect(model))
    assert {name for name in logged if name.startswith("spectra/")} == set(expected)
    for name, value in expected.items():
        assert [event.step for event in logged[name]] == [3, 6]
        assert logged[name][-1].value == pytest.approx(value, rel=1e-5), name


def test_every_n_steps(tmp_path: Path) -> None:
    trainer = trainer_of(adapted("msplora"), tmp_path)
    record_spectra(trainer, every=2)
    trainer.train()
    epochs, _ = top_values(trainer.state.log_history)["global"]
    np.testing.assert_allclose(epochs, [2 / 3, 4 / 3, 2], rtol=1e-3)


def test_recording_changes_nothing_of_the_training(tmp_path: Path) -> None:
    results = []
    for recorded in (False, True):
        model = adapted("msplora")
        trainer = trainer_of(model, tmp_path)
        if recorded:
            record_spectra(trainer, every=1)
        trainer.train()
        results.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    for name, parameter in results[0].items():
        torch.testing.assert_close(results[1][name], parameter, rtol=0, atol=0)


def test_numbers_that_are_not_finite_are_not_logged() -> None:
    model = adapted("msplora")
    fresh = scalars(collect(model))
    assert fresh["spectra/global/effective_rank"] == 0 and fresh["spectra/global/s1"] == 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_global"):
                parameter.fill_(float("nan"))
    broken = scalars(collect(model))
    assert not any(name.startswith("spectra/global/") for name in broken)
    assert "spectra/layer/s1" in broken
    json.dumps(broken, allow_nan=False)


def test_what_cannot_be_read_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no adapter 'default'"):
        record_spectra(trainer_of(ZOO["bert"].build(), tmp_path))
    vera = get_peft_model(ZOO["bert"].build(), VeraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ConfigError, match="PEFT method VERA"):
        record_spectra(trainer_of(vera, tmp_path))


def test_fig_3_of_a_run(tmp_path: Path) -> None:
    trainer = trainer_of(adapted("msplora"), tmp_path)
    record_spectra(trainer)
    trainer.train()
    actual = top_values(trainer.state.log_history)
    limit = max(float(np.nanmax(values)) for _, values in actual.values())
    for part, (epochs, values) in actual.items():
        ax = figures.spectra_over_epochs(values, list(epochs), part, limit=limit)
        assert ax.images[0].get_array().shape == values.shape and ax.images[0].norm.vmax == limit
