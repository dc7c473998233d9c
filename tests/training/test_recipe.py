"""A recipe is checked whole: all mistakes at once, each with the nearest right name."""

from pathlib import Path

import pytest
import yaml

from ziggurat.analysis.readers import READERS
from ziggurat.errors import RecipeError
from ziggurat.host.method import PAIRS_OF_PEFT, has_pairs
from ziggurat.recipe.methods import METHODS, method_config, method_fields
from ziggurat.recipe.recipe import load_recipe, make_recipe, resolved, shipped, to_yaml
from ziggurat.recipe.schema import keys
from ziggurat.recipe.tasks import TASKS

GOOD = {"model": "some/model", "data.train": "a.csv", "method.name": "lora", "method.r": 4}


def problems(text: str, tmp_path: Path, *words: str) -> list[str]:
    path = tmp_path / "glue.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        load_recipe(path, words)
    return [line.strip() for line in str(error.value).splitlines()]


def test_all_mistakes_come_at_once_with_the_right_names(tmp_path: Path) -> None:
    text = """
model: some/model
data.train: a.csv
train:
  lr: 4e-4
  batch: 16.5
head.poling: mean
method.name: lora
method.rank: 8
method.use_dora: maybe
task: clasification
seed: -1
"""
    assert problems(text, tmp_path) == [
        "glue.yaml has 7 problems:",
        "train.lr: '4e-4' is text to YAML, write 4.0e-4",
        "train.batch: needs a whole number, got 16.5",
        "head.poling: unknown, did you mean head.pooling?",
        f"task: 'clasification' is not one of {', '.join(TASKS)}, did you mean classification?",
        "seed: must be at least 0, got -1",
        "method.rank: unknown, did you mean method.r?",
        "method.use_dora: needs true or false, got 'maybe'",
    ]


def test_the_message_of_the_design(tmp_path: Path) -> None:
    text = "{model: m, data.train: a.csv, train.lr: 4e-4, method: {name: lora, rank: 8}}"
    assert "\n".join(problems(text, tmp_path)) == (
        "glue.yaml has 2 problems:\n"
        "train.lr: '4e-4' is text to YAML, write 4.0e-4\n"
        "method.rank: unknown, did you mean method.r?"
    )


@pytest.mark.parametrize(
    ("text", "written"), [("1E5", "1.0e+5"), ("-2e-3", "-2.0e-3"), ("'3.5'", "3.5 without quotes")]
)
def test_numbers_that_yaml_reads_as_texts(text: str, written: str, tmp_path: Path) -> None:
    problems_named = problems(f"{{model: m, data.train: a, method.name: lora, train.weight_decay: {text}}}", tmp_path)
    bare = text.strip("'")
    assert problems_named[1] == f"train.weight_decay: '{bare}' is text to YAML, write {written}"


def test_a_number_too_large_for_any_float_is_not_said_to_be_written_wrong(tmp_path: Path) -> None:
    problems_named = problems("{model: m, data.train: a, method.name: lora, train.lr: 1e400}", tmp_path)
    assert problems_named[1:] == ["train.lr: needs a number, got '1e400'"]


def test_another_programs_name_of_a_field_that_the_method_lacks(tmp_path: Path) -> None:
    """No advice that the next try would refuse."""
    for method, rest in (("full", "leave it out"), ("lora", "did you mean method.r?")):
        told = problems(f"{{model: m, data.train: a, method.name: {method}, lora_r: 8}}", tmp_path)
        assert len(told) == 2 and told[1].startswith("lora_r: unknown") and told[1].endswith(rest)


def test_nested_and_dotted_are_the_same(tmp_path: Path) -> None:
    nested = tmp_path / "run.yaml"
    nested.write_text("model: m\ndata: {train: a.csv}\nmethod: {name: lora, r: 4}\ntrain: {lr: 0.1}\n")
    assert load_recipe(nested) == make_recipe(
        {"name": "run", "model": "m", "data.train": "a.csv", "method.name": "lora", "method.r": 4, "train.lr": 0.1}
    )


@pytest.mark.parametrize(
    "text",
    ["train.lr: 0.1\ntrain.lr: 0.2", "train.lr: 0.1\ntrain: {lr: 0.2}", "train: {lr: 0.1, lr: 0.2}"],
)
def test_a_key_given_twice_is_refused(text: str, tmp_path: Path) -> None:
    problems_named = problems(f"model: m\ndata.train: a\nmethod.name: lora\n{text}", tmp_path)
    assert problems_named[1].startswith("train.lr: given twice, in line ")


def test_a_key_twice_inside_a_value_is_refused(tmp_path: Path) -> None:
    text = "model: m\ndata.train: a\nmethod.name: lora\nmethod.rank_pattern: {query: 4, query: 8}"
    assert "'query' is given twice" in problems(text, tmp_path)[1]


def test_yaml_never_builds_objects(tmp_path: Path) -> None:
    problems_named = problems("model: !!python/object/apply:os.getcwd []\ndata.train: a\nmethod.name: lora", tmp_path)
    assert problems_named[1].startswith("model: ") and "constructor" in problems_named[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the recipe is empty"),
        ("- a\n- b", "this is a list"),
        ("model: [a", "not readable as YAML"),
        ("train: 3", "train: needs its own keys, for example train.lr: 1.0e-3"),
        ("model: m", "data.train: missing"),
        ("model: m\ndata.train: a", "method.name: missing; one of "),
        ("method.name: lorra", "'lorra' is not one of"),
    ],
)
def test_what_is_missing_or_unreadable(text: str, message: str, tmp_path: Path) -> None:
    problems_named = problems(text, tmp_path)
    assert message in "\n".join(problems_named)
    # What can't be read lacks nothing in particular.
    assert len(problems_named) == 2 or text.startswith(("model: m", "method", "train"))


def test_a_word_without_a_value_takes_out_a_key_that_exists(tmp_path: Path) -> None:
    """A typing error would leave the key's value in force."""
    text = "model: m\ndata.train: a\nmethod.name: msplora\nmethod.r: 4\ntrain.epochs: 2\n"
    words = ["train.epoch=", "method.num_gruop=", "learning_rate=", "train="]
    assert problems(text, tmp_path, *words)[1:] == [
        "train.epoch: unknown, did you mean train.epochs?",
        "method.num_gruop: unknown, did you mean method.num_groups?",
        "learning_rate: unknown, did you mean train.lr?",
        "train: needs its own keys, for example train.lr: 1.0e-3",
    ]
    path = tmp_path / "whole.yaml"
    path.write_text(text, encoding="utf-8")
    # A key that the recipe doesn't have, and a field of another method: nothing to take out.
    recipe = load_recipe(
        path, ["train.epochs=", "method.r=", "data.max_length=", "method.target_rank=", "method.budget="]
    )
    assert recipe.train.epochs == load_recipe(path, ["train.epochs=3"]).train.epochs
    assert "r" not in recipe.method


def test_a_method_that_this_peft_lacks_does_not_hide_a_typing_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    monkeypatch.delattr(peft, "LilyConfig", raising=False)
    text = "model: m\ndata.train: a\nmethod.name: msplora\n"
    assert problems(text, tmp_path, "method.num_gruop=")[1:] == [
        "method.num_gruop: unknown, did you mean method.num_groups?"
    ]


def test_a_misspelt_section_finds_its_own_key(tmp_path: Path) -> None:
    assert "trian.lr: unknown, did you mean train.lr?" in problems("trian.lr: 1", tmp_path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"task": "instruct", "data.label": "mood"}, "data.label: has no meaning with task: instruct"),
        ({"data.format": "alpaca"}, "data.format: has no meaning with task: classification"),
        ({"task": "regression", "metric": "accuracy"}, "metric: accuracy does not go with task: regression"),
        ({"train.best": True, "train.evaluate": "never"}, "train.best: needs scores"),
        ({"train.best": True, "train.save": 5}, "train.save: must equal train.evaluate"),
        ({"resume": True, "overwrite": True}, "overwrite: contradicts resume"),
        ({"data.validation": "b.csv", "data.validation_rows": 5}, "data.validation_rows: has no meaning"),
        (
            {"data.train": "glue/rte", "data.validation_share": 0.2},
            "data.validation_share: has no meaning with glue/rte",
        ),
        ({"data.label_names": ["a", "b", "a"]}, "data.label_names: two classes have one name: a, b, a"),
        ({"head.dropout": 0.3}, "head.dropout: has no meaning with head.pooling: model"),
        ({"train.scheduler": "constant", "train.warmup": 100}, "train.warmup: has no meaning with train.scheduler"),
        ({"name": "a/b"}, "name: 'a/b' cannot name a folder"),
        ({"train.evaluate": "epochs"}, "did you mean epoch?"),
        ({"train.epochs": True}, "train.epochs: needs a number, got true"),
        ({"train.lr": float("nan")}, "train.lr: must be"),
        ({"data.label_names": "a"}, "data.label_names: needs a list"),
        ({"learning_rate": 0.1}, "did you mean train.lr?"),
        ({"method.target_moduls": ["query"]}, "did you mean method.target_modules?"),
        ({"method.peft_type": "LORA"}, "method.peft_type: unknown"),
        ({"method.name": "full"}, "method.r: full trains weights of the model itself and has no such field"),
        ({"method.from_adapter": "a"}, "method.from_adapter: lora has no such field; it belongs to aslora, "),
        ({"method.name": "mine"}, "method.name: 'mine' is not one of aslora, "),
        ({"method.name": "mine"}, "and no --plugin FILE has brought it"),
        ({"batch_size": 4}, "batch_size: unknown; here it is train.batch times train.accumulate"),
        ({"spectra": 0}, "spectra: 0 is neither epoch, never nor a whole number greater than 0"),
        ({"train.save": 0.5}, "train.save: 0.5 is neither epoch, never nor a whole number"),
        ({"train.class_weights": 5}, "train.class_weights: 5 is neither balanced nor a mapping"),
        ({"train.epochs": float("inf")}, "train.epochs: must be a finite number, got inf"),
        ({"train.epochs": "inf"}, "train.epochs: needs a number, got 'inf'"),
        ({"train.class_weights": {"a": float("nan")}}, "must be a finite number, got nan in {'a': nan}"),
        ({"method.lora_alpha": float("inf")}, "method.lora_alpha: must be a finite number, got inf"),
        ({"method.name": "vera", "spectra": 1}, "spectra: VeRA makes no adapter that analysis reads"),
    ],
)
def test_mistakes_that_each_say_what_to_do(more: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=r"the recipe has 1 problem:") as error:
        make_recipe({**GOOD, **more})
    assert message in str(error.value)


NUMBERS = [key for key, info in keys().items() if "float" in str(info.annotation)]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("key", NUMBERS)
def test_no_key_takes_a_number_that_is_not_finite(key: str, value: float) -> None:
    for given in (value, [value], {"a": value}):
        with pytest.raises(RecipeError, match=rf"{key}: must be a finite number"):
            make_recipe({**GOOD, key: given})


def test_methods_without_an_adapter_have_no_spectra_to_record() -> None:
    whole = {key: value for key, value in GOOD.items() if key != "method.r"}
    with pytest.raises(RecipeError, match=r"spectra: full makes no adapter that analysis reads"):
        make_recipe({**whole, "method.name": "full", "spectra": "epoch"})
    assert {name for name, row in METHODS.items() if row.config and not has_pairs(method_config({"name": name}))} == {
        "vera",
        "lily",
        "adapter",
    }
    assert set(READERS) == set(PAIRS_OF_PEFT)


def test_what_the_config_itself_refuses_is_told_with_the_rest() -> None:
    with pytest.raises(RecipeError) as error:
        make_recipe({**GOOD, "method.name": "msplora", "method.r": 6, "train.lr": "x"})
    message = str(error.value)
    assert "2 problems" in message and "train.lr: needs a number, got 'x'" in message
    assert "method: msplora refuses this: " in message


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("r", 4, "method.r: adalora never reads it; give init_r, the rank at the start, and target_r"),
        ("rank", 4, "method.rank: adalora never reads it; give init_r"),
        ("use_rslora", True, "method.use_rslora: adalora never reads it; take it out"),
        ("rank_pattern", {"query": 4}, "method.rank_pattern: adalora never reads it"),
    ],
)
def test_a_field_that_a_config_inherits_and_its_method_never_reads(field: str, value: object, message: str) -> None:
    choice = {**GOOD, "method.name": "adalora", f"method.{field}": value}
    if field != "r":
        del choice["method.r"]
    with pytest.raises(RecipeError, match="1 problem") as error:
        make_recipe(choice)
    assert message in str(error.value)
    assert field not in method_fields("adalora") and {"init_r", "target_r"} <= set(method_fields("adalora"))


def test_overrides_are_yaml_values_checked_alike(tmp_path: Path) -> None:
    recipe = load_recipe(
        "default", ["train.lr=1.0e-2", "method.r=4", "data.label_names=[bad, good]", "about=[half a list"]
    )
    assert (recipe.train.lr, recipe.method["r"], recipe.data.label_names) == (0.01, 4, ["bad", "good"])
    assert recipe.about == "[half a list"
    with pytest.raises(RecipeError) as error:
        load_recipe(
            "default",
            ["train.lr=fast", "oops", "method.rank=3", "method.name=lora", "train.batch=1", "train.batch=2"],
        )
    message = str(error.value)
    assert "4 problems" in message
    for part in (
        "needs a number, got 'fast'",
        "'oops' is not of the form key=value",
        "method.r?",
        "train.batch: given twice",
    ):
        assert part in message


def test_an_override_without_a_value_takes_the_key_out() -> None:
    recipe = load_recipe("roberta-mrpc", ["method.name=lora", "method.num_groups=", "head.lr=null"])
    assert "num_groups" not in recipe.method and recipe.head.lr is None


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.about
    assert "#" not in recipe.model and " " not in recipe.model  # a comment without a blank before it
    if recipe.method["name"] == "msplora":
        # The baseline of the same run is one override away, two where the recipe speaks of the pyramid.
        pyramid = ["method.num_groups=", "method.even_scales="]
        assert load_recipe(name, ["method.name=lora", *pyramid]).method["name"] == "lora"


def test_the_published_settings() -> None:
    """What the reference scripts run: epochs, length, rate; the head at half of it."""
    expected = {
        "mrpc": (30, 256, 4.0e-4, "accuracy"),
        "qnli": (25, 256, 4.0e-4, "accuracy"),
        "rte": (80, 512, 4.0e-4, "accuracy"),
        "sst2": (60, 256, 5.0e-4, "accuracy"),
        "stsb": (40, 256, 4.0e-4, "pearson"),
        "cola": (80, 256, 4.0e-4, "matthews"),
    }
    for task, (epochs, length, rate, metric) in expected.items():
        recipe = load_recipe(f"roberta-{task}")
        actual = (recipe.train.epochs, recipe.data.max_length, recipe.train.lr, recipe.metric)
        assert actual == (epochs, length, rate, metric)
        assert recipe.head.lr == pytest.approx(rate / 2)
        config = method_config(recipe.method)
        assert config is not None and [tier.r for tier in config.pyramid()] == [8, 4, 2]


def test_a_wrong_recipe_name_or_path_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"did you mean roberta-mrpc\?"):
        load_recipe("roberta-mrcp")
    (tmp_path / "review.yaml").touch()
    with pytest.raises(RecipeError, match=r"nearest in .*: review\.yaml"):
        load_recipe(tmp_path / "reviews.yaml")
    with pytest.raises(RecipeError, match=r"folder without a recipe\.yaml"):
        load_recipe(tmp_path)


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = load_recipe("default", ["train.lr=1.0e-5", "output=somewhere"])
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(recipe))
    assert resolved(load_recipe(path)) == resolved(recipe)
    assert yaml.safe_load(path.read_text())["train.lr"] == 1e-5


def test_a_methods_fields_are_read_off_its_config() -> None:
    assert {"r", "lora_alpha", "num_groups", "ranks", "tiers"} <= set(method_fields("msplora"))
    assert "peft_type" not in method_fields("lora") and "use_dora" not in method_fields("dora")
    for name, row in METHODS.items():
        assert (row.config is None) != (row.trains is None), name


def test_the_documentation_names_every_key() -> None:
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    missing = [name for name in [*keys(), *METHODS] if f"`{name}`" not in text]
    assert not missing


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("sequence_len", "data.max_length"),
        ("val_set_size", "data.validation_share"),
        ("field_messages", "data.columns.messages"),
        ("user_tag", "data.roles.user"),
        ("sample_packing", "data.packing"),
        ("cutoff_len", "data.max_length"),
        ("micro_batch_size", "train.batch"),
    ],
)
def test_names_of_other_tools_are_answered_with_ours(theirs: str, ours: str, tmp_path: Path) -> None:
    assert f"{theirs}: unknown, did you mean {ours}?" in problems(f"{theirs}: 1\n", tmp_path)
