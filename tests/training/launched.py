"""What each process of `test_launch.py` does: the command, once for each job of a file, as if launched for it alone.

A job is `{"way": "ddp" or "fsdp", "words": [...], "trouble": null or [kind, rank, step]}`. accelerate spreads models by
FSDP over accelerators only; here it is told that the processors of gloo's processes are such. All else is its own.
"""

import json
import os
import signal
import sys
from typing import Any

import yaml
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from ziggurat import cli
from ziggurat.cli.launch import config_file
from ziggurat.host.lifecycle import add_to_trainers

_made = AcceleratorState.__init__


def _on_processors(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    _made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = _on_processors  # type: ignore[method-assign]


class Trouble(TrainerCallback):
    """Brings the trouble that the job names upon one process, in the middle of a step."""

    job: list[Any] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kind, rank, step = self.job or (None, None, None)
        if state.global_step == step and args.process_index == rank:
            if kind == "error":
                raise ValueError("a batch that only this process has seen")
            os.kill(os.getpid(), getattr(signal, kind))


def settings_of(way: str) -> dict[str, str]:
    """What `accelerate launch` sets in the environment for the shipped config of `way`."""
    if way != "fsdp":
        return {}
    values = yaml.safe_load(config_file("fsdp2").read_text())["fsdp_config"]
    return {"ACCELERATE_USE_FSDP": "true"} | {
        name.upper().replace("FSDP_FSDP", "FSDP"): str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in values.items()
    }


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    add_to_trainers(Trouble)
    codes = []
    for number, job in enumerate(jobs):
        settings = settings_of(job["way"])
        # Each job is a launch of its own to whoever asks which process speaks of its end.
        os.environ |= settings | {"TORCHELASTIC_RESTART_COUNT": str(number)}
        Trouble.job = job["trouble"]
        sys.argv = ["ziggurat", "train", *job["words"]]
        try:
            cli.main()
        except SystemExit as stop:
            codes.append(stop.code)
        for name in settings:
            del os.environ[name]
        if codes[-1] not in (job.get("code", 0), 0):
            break
    print(f"codes of process {os.environ['RANK']}: {codes}", flush=True)
    raise SystemExit(0 if codes == [job.get("code", 0) for job in jobs] else 1)


if __name__ == "__main__":
    main()
