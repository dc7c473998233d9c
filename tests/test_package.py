"""The shipped files: versions, metadata, and the contents of the wheel and of the source package."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import ziggurat
from ziggurat._distribution import DISTRIBUTION

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCE = ROOT / "src" / "ziggurat"
INFO = f"{DISTRIBUTION.replace('-', '_')}-{ziggurat.__version__}.dist-info"
REPOSITORY = "https://example.org/us/ziggurat"
PAPERS = {
    "2503.21838": "MSPLoRA",
    "2503.00572": "LoR2C",
    "2408.06854": "LoRA²",
    "2406.10785": "ShareLoRA",
    "2311.09578": "Tied-LoRA",
    "2405.17604": "LoRA-XS",
    "2412.10135": "ASLoRA",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source package, built without a network."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    env = {**os.environ, "ZIGGURAT_REPOSITORY": REPOSITORY}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def shipped_files() -> set[str]:
    """Everything in the package's source that is no by-product of running it."""
    files = (path for path in SOURCE.parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(SOURCE.parent).as_posix() for path in files}


def test_the_wheel_holds_the_whole_package(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == shipped_files()
    for needed in ("py.typed", "recipes/default.yaml", "demo/train.parquet", "demo/validation.parquet"):
        assert f"ziggurat/{needed}" in names
    for name in sorted(names - {n for n in names if n.endswith(".py")}):
        assert wheel.read(name) == (SOURCE.parent / name).read_bytes()


def test_the_source_package_holds_what_builds_and_tests_it(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in shipped_files()} <= names
    for needed in ("pyproject.toml", "LICENSE", "CITATION.cff", "constraints.txt", "tests/zoo.py", "tests/conftest.py"):
        assert needed in names


def test_the_wheel_carries_the_licences(wheel: zipfile.ZipFile) -> None:
    metadata = Parser().parsestr(wheel.read(f"{INFO}/METADATA").decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    files = metadata.get_all("License-File") or []
    assert "LICENSE" in files
    assert any("vaderSentiment" in file for file in files)  # the demo data's
    for file in files:
        licence = f"{INFO}/licenses/{file}"
        assert wheel.read(licence) == (ROOT / file).read_bytes()


def test_links_on_pypi_lead_into_the_repository(wheel: zipfile.ZipFile) -> None:
    """The README's are relative, which PyPI can't follow; the address is the builder's."""
    metadata = Parser().parsestr(wheel.read(f"{INFO}/METADATA").decode())
    readme, tag = str(metadata.get_payload()), f"v{ziggurat.__version__}"
    targets = re.findall(r"\]\(([^)]+)\)", readme)
    assert len(targets) > 30 and [target for target in targets if not target.startswith(("https://", "#"))] == []
    assert f"]({REPOSITORY}/raw/{tag}/docs/pyramid.svg)" in readme
    inside = [target.removeprefix(f"{REPOSITORY}/blob/{tag}/") for target in targets if f"/blob/{tag}/" in target]
    assert inside and [path for path in inside if not (ROOT / path.partition("#")[0]).exists()] == []
    urls = dict(text.split(", ", 1) for text in metadata.get_all("Project-URL") or [])
    assert urls["Repository"] == REPOSITORY and {"Documentation", "Changelog", "Issues"} < set(urls)


def test_the_command_starts_where_the_wheel_says(wheel: zipfile.ZipFile) -> None:
    entries = wheel.read(f"{INFO}/entry_points.txt").decode()
    assert re.search(r"^ziggurat\s*=\s*ziggurat_command:main$", entries, re.MULTILINE)
    command = "import sys; sys.argv[1:] = ['--version']; from ziggurat_command import main; main()"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"ziggurat {PROJECT['version']}")


def test_one_name_everywhere(wheel: zipfile.ZipFile) -> None:
    assert DISTRIBUTION == PROJECT["name"] == "ziggurat-peft"
    metadata = Parser().parsestr(wheel.read(f"{INFO}/METADATA").decode())
    assert metadata["Name"] == DISTRIBUTION
    assert set(metadata.get_all("Provides-Extra") or []) == set(PROJECT["optional-dependencies"])


def test_one_version_everywhere() -> None:
    assert ziggurat.__version__ == PROJECT["version"] == citation()["version"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{PROJECT['version']}]" in changes


def dependency_lines() -> list[str]:
    """The lines of pyproject.toml that name requirements, in all lists of dependencies."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    main = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return [line for line in (main + extras).splitlines() if '"' in line]


def test_every_dependency_is_bounded_from_below_alone() -> None:
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *(item for extra in extras.values() for item in extra)]:
        requirement = Requirement(text)
        if requirement.name != DISTRIBUTION:
            operators = {s.operator for s in requirement.specifier}
            assert operators in ({">="}, {"=="}), f"{text}: a lower bound, or the one version that there is"


def test_every_dependency_says_what_it_is_for() -> None:
    main = [line for line in dependency_lines() if line.strip().startswith('"')]
    for line in main[: len(PROJECT["dependencies"])]:
        assert re.search(r"#\s+\w.{10,}", line), f"no reason beside {line.strip()}"


def test_the_installed_versions_lie_in_the_bounds() -> None:
    from importlib.metadata import version

    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(Version(version(requirement.name)), prereleases=True), text


def citation() -> dict:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_the_citation_names_the_papers() -> None:
    cff = citation()
    for field in ("cff-version", "message", "title", "authors", "license"):
        assert cff[field]
    assert cff["license"] == PROJECT["license"]
    cited = {ref["identifiers"][0]["value"].removeprefix("arXiv:"): ref for ref in cff["references"]}
    assert set(cited) == set(PAPERS)
    for number, name in PAPERS.items():
        assert name in cited[number]["title"]
        assert cited[number]["url"] == f"https://arxiv.org/abs/{number}"


@pytest.mark.parametrize("method", ["MSPLoraConfig", "LoR2CConfig", "LoRA2Config"])
def test_the_citation_and_the_model_cards_name_the_same_authors(method: str) -> None:
    bibtex = getattr(ziggurat, method)().citation
    (paper,) = [ref for ref in citation()["references"] if ref["url"].rpartition("/")[2] in bibtex]
    authors = " and ".join(f"{item['family-names']}, {item['given-names']}" for item in paper["authors"])
    assert f"author  = {{{authors}}}" in bibtex


def test_no_file_names_a_place_on_one_machine() -> None:
    """Absolute paths of a home, a temporary folder or a workplace mean nothing on another machine."""
    place = re.compile(r"(?<![\w./:~-])/(?:" + "home|root|Users|work|tmp|opt|mnt" + r")/[\w.]+")
    places = []
    for path in tracked_files():
        if path.suffix in (".parquet", ".png", ".safetensors"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if place.search(line):
                places.append(f"{path.relative_to(ROOT).as_posix()}:{number}: {line.strip()[:100]}")
    assert places == []


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_workflows_call_what_there_is() -> None:
    """Targets of the Makefile, programs of `.ci/clients`, the Pythons that the package promises."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    clients = re.findall(r'^    "(\w+)": Client\(', (ROOT / ".ci/clients").read_text(encoding="utf-8"), re.MULTILINE)
    files = (ROOT / ".github" / "workflows").glob("*.yml")
    jobs = [job for file in files for job in yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"].items()]
    lines = [step["run"] for _, job in jobs for step in job["steps"] if "run" in step]
    made = {line.split()[1] for line in lines if line.startswith("make ")}
    assert {"check", "test", "site"} <= made <= set(targets)
    assert {line.split()[0] for line in lines if "/" in line.split()[0]} == {".ci/clients"}
    asked = dict(jobs)["clients"]["strategy"]["matrix"]["client"]
    assert set(asked) <= set(clients) and {"trl", "lm_eval"} <= set(asked)
    promised = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert dict(jobs)["tests"]["strategy"]["matrix"]["python"] == promised


def test_the_site_has_every_page() -> None:
    nav = re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2])
    assert sorted(nav) == sorted(file.name for file in (ROOT / "docs").glob("*.md"))
