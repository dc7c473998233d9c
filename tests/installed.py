"""The packages that a process sees as installed: metadata written for it, of this project from its pyproject.toml."""

import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]

#: A method that a package of its own brings.
ELSEWHERE = '''
from dataclasses import dataclass
from ziggurat.kit import Card, FactorPair, Method, MethodConfig, low_rank, register

@dataclass
class ElsewhereConfig(MethodConfig):
    """LoRA again."""

def tensors(config, site):
    return low_rank(config.r, site.d_in, site.d_out, config.init_weights)

def pair(config, site, t, context):
    return FactorPair(t["A"], config.scale_of(config.r) * t["B"])

register(Method("elsewhere", ElsewhereConfig, tensors, pair, Card("Elsewhere", "", "LoRA again")))
'''


def install(site: Path, name: str, groups: dict[str, dict[str, str]]) -> None:
    """Metadata of an installed distribution with these entry points."""
    info = site / f"{name.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    lines = [f"[{group}]\n{entry} = {value}\n" for group, each in groups.items() for entry, value in each.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
