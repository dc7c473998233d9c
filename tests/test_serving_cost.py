"""plan, train and export report a pyramid's serving cost, and where it is larger than LoRA."""

from pathlib import Path

import pytest
from peft import get_peft_model

from commands import main
from methods_table import zoo_config
from ziggurat.export import export_model
from ziggurat.export.serving import cost_of_serving
from ziggurat.plan import plan
from zoo import ZOO

TWICE = "as plain LoRA it has rank 14, which servers pad to 16: 2 times the memory and time of LoRA r 8 there"


def test_ranks_that_add_up_are_told(tmp_path: Path) -> None:
    model = get_peft_model(ZOO["llama"].build(), zoo_config("msplora", "llama", r=8))
    assert cost_of_serving(model) == TWICE
    assert export_model(model, tmp_path / "plain").cost == TWICE
    assert TWICE in plan(ZOO["llama"].build(), zoo_config("msplora", "llama", r=8)).notes
    same = get_peft_model(ZOO["llama"].build(), zoo_config("sharelora", "llama", r=8))
    assert cost_of_serving(same) is None


def test_a_pyramid_on_few_layers_is_larger_than_lora() -> None:
    config = zoo_config("msplora", "llama", r=8, layers_to_transform=[0])
    assert any("larger than LoRA r 8 on the same layers (" in note for note in plan(ZOO["llama"].build(), config).notes)
    whole = plan(ZOO["llama"].build(), zoo_config("msplora", "llama", r=8, target_modules=["q_proj"]))
    assert not any("larger than LoRA" in note for note in whole.notes)


def test_tiers_of_their_own_are_compared_with_lora_of_the_largest() -> None:
    """Not with LoRA of the field r, which such a pyramid doesn't read."""
    tiers = [{"name": "global", "groups": 1, "r": 16}, {"name": "layer", "groups": "layers", "r": 1}]
    config = zoo_config("msplora", "llama", tiers=tiers, target_modules=["q_proj"])
    assert config.r != config.largest_rank == 16
    assert plan(ZOO["llama"].build(), config).r == 16
    told = cost_of_serving(get_peft_model(ZOO["llama"].build(), config))
    assert (
        told == "as plain LoRA it has rank 17, which servers pad to 32: 2 times the memory and time of LoRA r 16 there"
    )


def test_tiers_that_act_count_by_the_ranks_of_their_roles() -> None:
    config = zoo_config("msplora", "llama", r=2, rank_pattern={"q_proj": [8, 2, 1], "v_proj": [4, 2, 1]})
    assert plan(ZOO["llama"].build(), config).r == 8
    tiers = [{"name": "global", "groups": 1, "r": 2}, {"name": "expert", "groups": 1, "expert_groups": 4, "r": 8}]
    assert plan(ZOO["llama"].build(), zoo_config("msplora", "llama", tiers=tiers)).r == 2


def test_the_command_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ZOO["llama"].build()
    base.save_pretrained(str(tmp_path / "base"))
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, zoo_config("msplora", "llama", r=8, task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "adapter"))
    assert main("export", str(tmp_path / "adapter"), str(tmp_path / "out")) == 0
    assert f"note: {TWICE}" in capsys.readouterr().out
