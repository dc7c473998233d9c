"""The findings of `ziggurat doctor` about the machine: versions, extras, processor, accelerators, disk."""

import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from ziggurat._distribution import DISTRIBUTION
from ziggurat.extras import EXTRAS, install_command, missing
from ziggurat.host import supported

from .finding import Finding

#: Below this the weights of a small model, a checkpoint and an adapter no longer fit.
LITTLE_DISK = 2 * 10**9


def environment() -> Iterator[Finding]:
    """Problems of the installed versions: errors and warnings, no notes."""
    yield from (finding for finding in machine() if finding.level != "note")


def machine() -> Iterator[Finding]:
    """All findings about this machine, with notes."""
    yield from _requirements()
    yield from _versions()
    yield from _processor()
    yield from _disk()


def _requirements() -> Iterator[Finding]:
    """Requirements of pyproject.toml that are missing or too old; incomplete extras."""
    try:
        listed = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        why = "Python has the source of ziggurat, but no installed distribution of that name"
        yield Finding("warning", f"{DISTRIBUTION} is not installed", why, "install it again: pip install .")
        listed = []
    brought = {package: extra for extra, packages in reversed(EXTRAS.items()) for package in packages}
    for requirement in listed:
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not needed and requirement.name not in brought:  # a development tool
            continue
        spec = f"{requirement.name}{requirement.specifier}"
        try:
            have = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if needed:
                why = f"ziggurat needs {spec}"
                yield Finding("error", f"{requirement.name} is not installed", why, f"pip install '{spec}'")
            continue
        if not requirement.specifier.contains(have, prereleases=True):
            asking = "ziggurat" if needed else f"{DISTRIBUTION}[{brought[requirement.name]}]"
            level = "error" if needed else "warning"
            yield Finding(level, f"{requirement.name} {have}", f"{asking} needs {spec}", f"pip install '{spec}'")
    for extra, packages in EXTRAS.items():
        if lacking := missing(packages):
            why = f"{', '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not installed"
            do = f"{install_command(lacking)}, if a command asks for it"
            yield Finding("note", f"extra {extra}: not complete", why, do)


def _versions() -> Iterator[Finding]:
    """PEFT, transformers and torch against the tested sets."""
    have = supported.installed()
    shown = ", ".join(f"{name} {number}" for name, number in have.items())
    if (limits := supported.limits()) is not None:
        yield Finding("warning", "a limited pair of versions", limits)
    for package, number in have.items():
        if supported.untested(package, number):
            yield Finding(
                "warning",
                f"{package} {number}",
                f"the newest version that was tested is {supported.newest(package)}",
                f"pip install '{package}=={supported.newest(package)}', if something fails",
            )
    row = supported.tested_here()
    if row is None:
        rows = "; ".join(", ".join(f"{name} {row.versions[name]}" for name in have) for row in supported.tested())
        yield Finding("note", shown, f"these versions were not tested together; tested were: {rows}")
        return
    level = "note" if row.passed else "warning"
    yield Finding(level, shown, f"tested together on {row.ran} ({row.why}): {row.result}")
    for fails in row.fails:
        yield Finding("warning", f"with {shown}", fails, "docs/guarantees.md has the reason")


def _processor() -> Iterator[Finding]:
    import torch

    features = torch.backends.cpu.get_cpu_capability()
    yield Finding(
        "note",
        f"processor: {platform.machine()}, {features}, {torch.get_num_threads()} threads",
        f"Python {platform.python_version()}",
    )
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if accelerator is not None else 0
    yield Finding(
        "note",
        f"accelerators: {f'{count} of kind {accelerator.type}' if accelerator is not None else 'none'}",
        "models train on them" if accelerator is not None else "models train on the processor",
    )


def _disk() -> Iterator[Finding]:
    """Free space in the folder of runs and in the cache of models."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for label, folder in (("this folder", Path.cwd()), ("the cache of models", Path(HF_HUB_CACHE))):
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(existing).free
        level = "warning" if free < LITTLE_DISK else "note"
        do = "free some, or name another place (output=, HF_HOME)" if level == "warning" else ""
        yield Finding(level, f"disk: {free / 1e9:.1f} GB free for {label}", f"{folder}", do)
