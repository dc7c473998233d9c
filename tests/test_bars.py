"""The libraries' progress bars: the commands show none, and leave the user's settings as they were."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import utils as hub
from peft import get_peft_model
from transformers import AutoModelForCausalLM, logging

from commands import main
from methods_table import zoo_config
from ziggurat.host.bars import without_bars
from zoo import ZOO


@pytest.fixture(autouse=True)
def bars() -> Iterator[None]:
    """Bars shown, and afterwards as before."""
    shown, hidden = logging.is_progress_bar_enabled(), hub.are_progress_bars_disabled()
    logging.enable_progress_bar()
    yield
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    (hub.disable_progress_bars if hidden else hub.enable_progress_bars)()


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("of_the_hub", [True, False])
def test_the_settings_come_back(shown: bool, of_the_hub: bool) -> None:
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    (hub.enable_progress_bars if of_the_hub else hub.disable_progress_bars)()
    with pytest.raises(KeyError), without_bars():
        assert not logging.is_progress_bar_enabled() and hub.are_progress_bars_disabled()
        raise KeyError
    assert logging.is_progress_bar_enabled() is shown
    assert hub.are_progress_bars_disabled() is not of_the_hub


def test_merge_shows_no_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ZOO["llama"].build()
    model.save_pretrained(tmp_path / "base")
    made = get_peft_model(model, zoo_config("msplora", "llama", init_weights=False))
    made.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    made.save_pretrained(str(tmp_path / "adapter"))
    AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
    assert "Loading weights" in capsys.readouterr().err  # what the command would say
    assert main("merge", str(tmp_path / "adapter"), str(tmp_path / "out")) == 0
    shown = capsys.readouterr()
    assert "%" not in shown.err and "merged model written" in shown.out
    assert logging.is_progress_bar_enabled()
