"""Kill real `ziggurat train` runs by SIGKILL, again and again, resume them, and compare with runs that nobody killed.

    python benchmarks/crash_campaign.py                      # 50 kills, writes benchmarks/crash_campaign.md
    python benchmarks/crash_campaign.py --kills 6 --out -    # a few, as the tests do

Each run is the command itself in a forked child: the libraries are loaded once. Moments are drawn from a seeded
generator, of five kinds:

    clock     after a share of the time that the whole run takes
    file      just before one of the actions on files that the run is known to make in its folders (open, rename,
              delete, make), by Python's audit events; so between a write and its rename, and before each fsync
    torn      a moment after such an action: in the middle of a write, or of what the system does with it
    end       just before one of these actions from where the result is written, until it is in its place
    method    around a restructuring or pruning: before it, after it, or just before what it decided is learned by

After each kill the folders are looked at as a stranger would: what is in the output's place must be a whole result,
what the program takes for its last checkpoint must be readable to the last file. Then comes the command that a user is
told to give, which may be killed again. A run that survives must have the reference's adapter, byte for byte.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "training")]

#: Settings of all runs: dropout, so that a random number drawn once too often shows; 5 steps an epoch; 13 in all.
COMMON = {
    "data.validation_rows": 8,
    "train.batch": 8,
    "train.lr": 1.0e-2,
    "train.epochs": 10,
    "train.max_steps": 13,
    "train.keep": 1,
    "seed": 7,
}
#: One run a method: checkpoints by steps and scores by epochs, both by epochs, the best kept.
RUNS: dict[str, dict[str, Any]] = {
    "msplora": {"method.r": 4, "method.lora_dropout": 0.2, "train.save": 2, "train.evaluate": "epoch"},
    "lor2c": {
        "method.r": 4,
        "method.lora_dropout": 0.2,
        "method.merges": 1,
        "method.injections": 1,
        "train.max_steps": 15,
        "train.save": "epoch",
        "train.evaluate": "epoch",
        "train.keep": 2,
    },
    "lora2": {
        "method.r": 4,
        "method.lora_dropout": 0.2,
        "method.target_rank": 1,
        "method.initial_warmup": 2,
        "method.final_warmup": 3,
        "method.mask_interval": 2,
        "train.save": 3,
        "train.evaluate": 3,
        "train.best": True,
    },
}
#: Where a method changes its own structure: module, class (or ""), function.
TURNS = {
    "lor2c": ("ziggurat.methods.lor2c.paths", "PathBank", "restructure"),
    "lora2": ("ziggurat.methods.lora2.callback", "", "prune"),
}
KINDS = ("clock", "file", "torn", "method", "end")
#: Longest time a run may take, in seconds: it hangs.
PATIENCE = 900


@dataclass(frozen=True)
class Aim:
    """When to kill: at `share` of the run's time, or `later` seconds on from action or call number `at`; `kind` above.

    For the kind "method" a `later` of 0 is before the call, one below 0 right after it.
    """

    kind: str
    share: float = 0.0
    at: int = 0
    later: float = 0.0


@dataclass
class Run:
    """One run of a method, how long it takes, what it does to files, and what it must end with."""

    method: str
    recipe: Path
    output: Path
    seconds: float = 0.0
    actions: int = 0
    late: int = 0
    calls: int = 0
    digest: dict[str, str] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        return self.output.with_name(self.output.name + ".unfinished")


@dataclass
class Tally:
    """What has happened: kills by method, kind and what was going on; everything that was wrong."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    doing: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    afresh: int = 0
    in_place: int = 0
    ends: int = 0
    missed: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def killed(self) -> int:
        return sum(self.kills.values())


# --- in the child --------------------------------------------------------------------------------


class Watcher:
    """Numbers the actions on files below `folder`, writes them down, and kills at the one aimed at."""

    EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.posix_fallocate", "shutil.rmtree")

    def __init__(self, near: Path, log: Path, aim: Aim | None) -> None:
        self.near, self.aim, self.number, self.late = str(near), aim, 0, 0
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in self.EVENTS or not any(self.near in str(argument) for argument in arguments[:2]):
            return
        self.number += 1
        self.late += bool(self.late) or (event == "os.mkdir" and str(arguments[0]).endswith("ready"))
        os.write(self.log, f"{event} {Path(str(arguments[0])).name}\n".encode())
        number = self.late if self.aim is not None and self.aim.kind == "end" else self.number
        if self.aim is not None and self.aim.kind in ("file", "torn", "end") and number == self.aim.at:
            die(self.aim.later if self.aim.kind == "torn" else 0.0)


def die(later: float = 0.0) -> None:
    """SIGKILL this process, now or `later`."""
    if not later:
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=lambda: (time.sleep(later), die()), daemon=True).start()


def count_turns(method: str, log: Path, aim: Aim | None) -> None:
    """Count what changes a method's structure, and kill around the call aimed at."""
    if method not in TURNS:
        return
    module, owner, name = TURNS[method]
    place: Any = importlib.import_module(module)
    place = getattr(place, owner) if owner else place
    real: Callable[..., Any] = getattr(place, name)
    calls = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    number = 0

    def turn(*args: Any, **kwargs: Any) -> Any:
        nonlocal number
        number += 1
        os.write(calls, b".")
        hit = aim is not None and aim.kind == "method" and aim.at == number
        if hit and aim is not None and aim.later == 0.0:
            die()
        result = real(*args, **kwargs)
        if hit and aim is not None:
            die(aim.later if aim.later > 0 else 0.0)
        return result

    setattr(place, name, turn)


def child(run: Run, words: list[str], logs: Path, aim: Aim | None) -> None:
    """What a forked child does: the command, and nothing after it."""
    code = 70
    try:
        out = os.open(logs / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.addaudithook(Watcher(run.output, logs / "actions", aim))
        count_turns(run.method, logs / "calls", aim)
        from ziggurat.cli import main

        sys.argv = ["ziggurat", "train", str(run.recipe), *words]
        main()
    except SystemExit as done:
        code = int(done.code or 0)
        (logs / "modules").write_text("\n".join(sys.modules))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


# --- in the parent -------------------------------------------------------------------------------


def start(run: Run, words: list[str], logs: Path, aim: Aim | None) -> tuple[int, float]:
    """Fork the command; kill it by the clock if so aimed. Returns how it ended, as `os.waitpid` tells, and seconds."""
    logs.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        child(run, words, logs, aim)
    limit = begun + (aim.share * run.seconds if aim is not None and aim.kind == "clock" else PATIENCE)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status, time.monotonic() - begun
        if time.monotonic() >= limit:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            return status, time.monotonic() - begun
        time.sleep(0.002)


def reference(run: Run, logs: Path) -> None:
    """Let the run go through, and keep what it did and what it gave."""
    status, run.seconds = start(run, [], logs, None)
    if status != 0:
        raise SystemExit(f"{run.method}: the run nobody killed failed:\n{(logs / 'output').read_text()}")
    actions = (logs / "actions").read_text().splitlines()
    run.actions, run.late = len(actions), len(actions) - actions.index("os.mkdir ready")
    run.calls = len((logs / "calls").read_text()) if (logs / "calls").exists() else 0
    run.digest = digest(run.output)
    # What the command imports on its way is loaded once, here, for all that are forked after it.
    for name in (logs / "modules").read_text().splitlines():
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of the adapter's files, and its scores: what a resumed run must give again."""
    files = [*folder.glob("*.safetensors"), *folder.glob("adapter_config.json"), *folder.glob("events.json")]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}
    return digests | {"after": json.dumps(json.loads((folder / "run.json").read_text())["after"], sort_keys=True)}


def draw(run: Run, chance: random.Random, kind: str) -> Aim:
    """A moment of that kind in the run."""
    if kind == "method" and run.calls:
        return Aim("method", at=chance.randint(1, run.calls), later=chance.choice([0.0, -1.0, chance.uniform(0, 0.05)]))
    if kind == "end":
        return Aim(kind, at=chance.randint(1, run.late))
    if kind in ("file", "torn"):
        return Aim(kind, at=chance.randint(1, run.actions), later=chance.uniform(0.0, 0.004))
    return Aim("clock", share=chance.uniform(0.0, 1.0))


def whole_result(run: Run, old: dict[str, str]) -> str:
    """What is wrong with what stands in the output's place: nothing may, or the old result, or the new one."""
    if not run.output.exists():
        return ""
    try:
        written = digest(run.output)
    except (OSError, ValueError, KeyError) as error:
        return f"the output is no whole result: {error}"
    if written == run.digest or (old and written == old):
        return ""
    return f"the output's adapter is not the reference's: {written} != {run.digest}"


def whole_checkpoint(run: Run) -> str:
    """What is wrong with the checkpoint that the program would go on from: each file is read to its end."""
    import torch
    from safetensors.torch import load_file

    from ziggurat.recipe.recipe import load_recipe
    from ziggurat.training.folder.run_folder import RunFolder

    folder = RunFolder(load_recipe(str(run.recipe), [])).last_checkpoint()
    if folder is None:
        return ""
    needed = {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    missing = needed - {path.name for path in folder.iterdir()}
    if missing:
        return f"{folder.name} lacks {', '.join(sorted(missing))}"
    try:
        for path in folder.iterdir():
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix in (".pt", ".pth", ".bin"):
                torch.load(path, weights_only=False)
            elif path.suffix == ".json":
                json.loads(path.read_text())
    except Exception as error:
        return f"{folder.name}/{path.name} is broken: {type(error).__name__}: {error}"
    return ""


def next_words(run: Run, replacing: bool) -> list[str]:
    """What a user is told to give next: go on where there is a checkpoint, else start again."""
    from ziggurat.recipe.recipe import load_recipe
    from ziggurat.training.folder.run_folder import RunFolder

    if RunFolder(load_recipe(str(run.recipe), [])).last_checkpoint() is not None:
        return ["resume=true"]
    return ["overwrite=true"] if run.work.exists() or replacing else []


def doing(logs: Path) -> str:
    """In what a killed run was interrupted, by its last action on a file."""
    try:
        last = (logs / "actions").read_text().splitlines()[-1]
    except (OSError, IndexError):
        return "before its first file"
    event, _, name = last.partition(" ")
    verb = {"open": "at", "os.rename": "renaming", "os.mkdir": "making"}.get(event, "deleting")
    return f"{verb} {'.'.join(part for part in name.split('.') if not part.isdigit())}"


def one_life(
    run: Run, tally: Tally, chance: random.Random, kills: int, logs: Path, report: Callable[[str], None]
) -> None:
    """Kill one run up to `kills` times, going on as told each time; then let it end, and compare."""
    replacing = chance.random() < 0.3 and run.output.exists()
    if not replacing:
        shutil.rmtree(run.output, ignore_errors=True)
    old = dict(run.digest) if replacing else {}
    if replacing:
        mark_as_old(run)
        old = digest(run.output)
    words, first = (["overwrite=true"] if replacing else []), True
    while True:
        aim = draw(run, chance, KINDS[tally.killed % len(KINDS)]) if kills else None
        status, _ = start(run, words, logs, aim)
        output = (logs / "output").read_text(errors="replace")
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            if aim is None:
                tally.faults.append(f"{run.method}: the run took more than {PATIENCE} s: {output.strip()[-600:]}")
                return
            kills -= 1
            tally.kills[run.method, aim.kind] += 1
            tally.doing[doing(logs)] += 1
            for wrong in (whole_result(run, old), whole_checkpoint(run)):
                if wrong:
                    tally.faults.append(
                        f"{run.method}, {aim}, {doing(logs)}, {' '.join(words) or 'first start'}: {wrong}"
                    )
            words = next_words(run, replacing)
            tally.resumed += words == ["resume=true"]
            tally.afresh += words != ["resume=true"]
            report(f"{run.method}: killed by {aim.kind} {doing(logs)}; then {' '.join(words) or 'the same command'}")
            first = False
            continue
        code = os.waitstatus_to_exitcode(status)
        if code == 2 and not first and ("is finished" in output or "a finished run already" in output):
            tally.in_place += 1  # killed with the result ready: the next command has put it in its place
        elif code != 0:
            tally.faults.append(f"{run.method}: `{' '.join(words)}` ended with {code}: {output.strip()[-600:]}")
            shutil.rmtree(run.work, ignore_errors=True)
            shutil.rmtree(run.output, ignore_errors=True)
            return
        elif aim is not None:
            tally.missed += 1  # it was faster than the clock, or did less than from the start
        tally.ends += 1
        if digest(run.output) != run.digest:
            tally.faults.append(f"{run.method}: resumed to another adapter: {digest(run.output)} != {run.digest}")
        left = [path.name for path in run.output.parent.glob(f"*{run.output.name}*") if path != run.output]
        if left and code == 0:
            tally.faults.append(f"{run.method}: left behind: {', '.join(sorted(left))}")
        return


def mark_as_old(run: Run) -> None:
    """Make the finished result in the output's place another one, as of an earlier run."""
    path = run.output / "run.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "after": {"accuracy": -1.0}}))


def campaign(kills: int, seed: int, methods: list[str], report: Callable[[str], None]) -> tuple[list[Run], Tally]:
    """The whole campaign in a folder of its own."""
    import torch
    from training_tables import reviews, save_tiny_bert, write_csv

    torch.set_num_threads(1)
    chance, tally = random.Random(seed), Tally()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        save_tiny_bert(place / "tiny-bert")
        data = write_csv(place / "reviews.csv", [dict(row) for row in reviews(48)])
        runs = [prepared(method, place, data) for method in methods]
        for run in runs:
            reference(run, place / "logs" / run.method)
            report(f"{run.method}: {run.seconds:.1f} s, {run.actions} actions on files, {run.calls} turns")
        while tally.killed < kills and len(tally.faults) < 10:
            for run in runs:
                now = min(chance.randint(1, 3), kills - tally.killed)
                if now > 0:
                    one_life(run, tally, chance, now, place / "logs" / run.method, report)
    return runs, tally


def prepared(method: str, place: Path, data: Path) -> Run:
    """The recipe of a method's run, written down."""
    import yaml

    output = place / "runs" / method
    settings = {"name": method, "model": str(place / "tiny-bert"), "data.train": str(data), "output": str(output)}
    settings |= {**COMMON, "method.name": method, **RUNS[method]}
    recipe = place / f"{method}.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    return Run(method, recipe, output)


def page(runs: list[Run], tally: Tally, seed: int, seconds: float) -> str:
    """What is written down of the campaign."""
    names = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "safetensors"))
    lines = [
        "# Kills and resumes",
        "",
        f"    python benchmarks/crash_campaign.py --kills {tally.killed} --seed {seed}",
        "",
        f"{tally.killed} SIGKILLs of `ziggurat train` on a tiny BERT, one thread, {seconds:.0f} s in all. "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {names}.",
        "",
        "| method | " + " | ".join(KINDS) + " |",
        "|---|" + "--:|" * len(KINDS),
    ]
    lines += [
        f"| {run.method} | " + " | ".join(str(tally.kills[run.method, kind]) for kind in KINDS) + " |" for run in runs
    ]
    lines += [
        "",
        f"After the kill the program went on from a checkpoint {tally.resumed} times and started again {tally.afresh} "
        f"times. {tally.ends} runs came to their end, {tally.in_place} of them killed with the result ready, which the "
        f"next command put in its place. {len(tally.faults)} faults: broken results, broken checkpoints, adapters or "
        "scores that differ from the reference's in a byte, commands that failed, folders left behind.",
        "",
        "Interrupted in:",
        "",
        "| last action on a file | kills |",
        "|---|--:|",
        *(f"| {what} | {count} |" for what, count in tally.doing.most_common()),
        "",
        *(f"- {fault}" for fault in tally.faults),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default=",".join(RUNS))
    parser.add_argument("--out", default=str(HERE / "crash_campaign.md"), help="file to write, - for none")
    given = parser.parse_args()
    begun = time.monotonic()
    runs, tally = campaign(given.kills, given.seed, given.methods.split(","), lambda line: print(line, flush=True))
    text = page(runs, tally, given.seed, time.monotonic() - begun)
    if given.out == "-":
        print(text)
    else:
        Path(given.out).write_text(text, encoding="utf-8")
    for fault in tally.faults:
        print("FAULT", fault)
    print(f"{tally.killed} kills, {tally.ends} ends, {len(tally.faults)} faults")
    raise SystemExit(bool(tally.faults))


if __name__ == "__main__":
    main()
