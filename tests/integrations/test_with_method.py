"""`ziggurat with`: a program's LoraConfig becomes another method's config, in its child processes too."""

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from peft import LoraConfig

import ziggurat_door
from commands import main
from fresh import Fresh
from installed import ELSEWHERE, PROJECT, install
from ziggurat.errors import ConfigError
from ziggurat.host import plugins
from ziggurat.integrations.with_method import of_method
from ziggurat.kit import unregister

PROGRAM = """
import copy, dataclasses, inspect, pickle
from peft import LoraConfig, PeftConfig
assert list(inspect.signature(LoraConfig).parameters)[0] != "args"
real = PeftConfig.from_pretrained("lora")
assert type(real) is LoraConfig and type(LoraConfig.from_pretrained("lora")) is LoraConfig
for again in (copy.copy(real), copy.deepcopy(real), pickle.loads(pickle.dumps(real)), dataclasses.replace(real, r=3)):
    assert type(again) is LoraConfig and again.target_modules == {"q_proj"} and again.r == 3, again

@dataclasses.dataclass
class Mine(LoraConfig):
    more: int = 0

assert type(Mine(r=2, more=1)) is Mine
made = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
assert type(made).__name__ == "MSPLoraConfig" and not isinstance(made, LoraConfig), made
assert (made.r, made.lora_alpha, made.even_scales, made.task_type) == (4, 8, True, "CAUSAL_LM")
assert pickle.loads(pickle.dumps(made)) == made
try:
    LoraConfig(use_dora=True)
except ValueError as error:
    assert "MSPLoraConfig can't follow LoRA's use_dora=True" in str(error)
else:
    raise AssertionError("DoRA was taken for MSPLoRA")
"""


@pytest.fixture
def turning(tmp_path: Path) -> Iterator[Fresh]:
    """Programs as `ziggurat with msplora even_scales=true` starts them."""
    install(tmp_path / "site", PROJECT["name"], PROJECT["entry-points"])
    request = {"method": "msplora", "fields": {"even_scales": True}, "plugins": [], "mark": str(tmp_path / "mark")}
    path = [str(tmp_path / "site"), str(Path(ziggurat_door.__file__).parent)]
    with closing(Fresh(tmp_path, "peft", PYTHONPATH=":".join(path), ZIGGURAT_WITH=json.dumps(request))) as fresh:
        yield fresh


def test_what_a_program_makes_is_the_method_and_what_it_loads_is_not(turning: Fresh, tmp_path: Path) -> None:
    LoraConfig(r=3, target_modules=["q_proj"]).save_pretrained(str(tmp_path / "lora"))
    done = turning.run(PROGRAM, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mark").exists()


MARKS = "import json, os; told = json.loads(os.environ['ZIGGURAT_WITH']); open(told['mark'], 'w').write('')"


def test_the_program_is_run_with_its_words(tmp_path: Path) -> None:
    """Whatever they look like: `--debug`, `--plugin` and `--help` are the program's own."""
    program = f"{MARKS}; import sys; json.dump([told, sys.argv[1:]], open({str(tmp_path / 'said')!r}, 'w'))"
    words = ["--debug", "--plugin", "a.py", "--", "r=1", "--help"]
    given = ["with", "msplora", "even_scales=true", "num_groups=2", "--", sys.executable, "-c", program, *words]
    assert main(*given) == 0
    sent, argv = json.loads((tmp_path / "said").read_text())
    assert (sent["method"], sent["fields"], sent["plugins"]) == ("msplora", {"even_scales": True, "num_groups": 2}, [])
    assert argv == words


def test_a_program_in_which_no_lora_was_made_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("with", "msplora", "--", sys.executable, "-c", "pass") == 2
    assert "made no LoraConfig: nothing in it was trained by msplora" in capsys.readouterr().err


@pytest.mark.parametrize(("ends", "code"), [("raise SystemExit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_the_exit_code_is_the_programs(ends: str, code: int) -> None:
    assert main("with", "msplora", "--", sys.executable, "-c", f"import os; {ends}") == code


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["mspl0ra", "--", "true"], "there is no method 'mspl0ra', did you mean msplora? There are "),
        (["msplora", "even_scale=true", "--", "true"], "no field 'even_scale', did you mean even_scales?"),
        (["msplora", "r=none", "--", "true"], "r='none'"),
        (["msplora", "sites=3", "--", "true"], "has no field 'sites'"),
        (["msplora", "revision=main", "--", "true"], "revision is set by the program itself"),
        (["msplora", "task_type=CAUSAL", "--", "true"], "MSPLoraConfig: Invalid task type: 'CAUSAL'"),
        (["msplora", "--", "no-such-program"], "there is no program 'no-such-program'"),
        (["msplora", "--", __file__], "It is a file that can't be run by itself: `python FILE`?"),
        (["msplora", "r=4", "--"], "no program to run"),
        (["msplora", "r=4", "true"], "no program to run"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("with", *words) == 2
    assert error in capsys.readouterr().err


def test_a_method_of_ones_own_goes_along(tmp_path: Path) -> None:
    (tmp_path / "elsewhere_too.py").write_text(ELSEWHERE)
    program = f"{MARKS}; json.dump(told, open({str(tmp_path / 'said')!r}, 'w'))"
    try:
        plugin = str(tmp_path / "elsewhere_too.py")
        assert main("--plugin", plugin, "with", "elsewhere", "--", sys.executable, "-c", program) == 0
        assert json.loads((tmp_path / "said").read_text())["plugins"] == [plugin]
        assert of_method(LoraConfig(r=5), "elsewhere", {}).r == 5
    finally:
        unregister("elsewhere")
        sys.modules.pop("elsewhere_too", None)
        plugins._loaded.clear()


def test_a_field_wins_over_loras() -> None:
    assert of_method(LoraConfig(r=4), "msplora", {"r": 8}).r == 8
    with pytest.raises(ConfigError, match="rank_pattern"):
        of_method(LoraConfig(rank_pattern={"q_proj": 2}), "msplora", {})


def test_a_plugin_that_is_given_by_its_path_lies_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """ms-swift puts the file's folder before all others on its path for imports: nothing there may shadow a package."""
    assert main("plugin-path", "swift") == 0
    file = Path(capsys.readouterr().out.strip())
    assert [other.name for other in file.parent.glob("*.py") if other.name != "__init__.py"] == [file.name]
    assert file.name == "ziggurat_swift.py"
    assert main("plugin-path", "axolotl") == 2
    assert "there is one for swift" in capsys.readouterr().err
