"""What combines with what: the one table behind `ziggurat doctor` and docs/combinations.md.

A cell says how far it is known: "yes" rests on the named tests, "no" on a test or on how the thing is made;
"limited" works with what `why` says; "untested" claims nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

METHODS = {"msplora": "MSPLoRA", "lora2": "LoRA²", "lor2c": "LoR2C"}
STATUS = ("yes", "limited", "no", "untested")
SECTIONS = {"base": "Base weights", "train": "Training", "distributed": "Several processes", "use": "Using and serving"}

_CONTRACTS = "tests/contracts/test_adapters.py::"
_TRAINING = "tests/contracts/test_training.py::"
_QUANTISED = "tests/host/test_quantised.py::"


@dataclass(frozen=True)
class Fact:
    """One row. `key` is what checks ask for, `cells` the status by method, `evidence` the tests that show it."""

    key: str
    section: str
    what: str
    cells: dict[str, str]
    why: str = ""
    instead: str = ""
    evidence: tuple[str, ...] = ()
    #: Method -> its own why and instead, where the row's don't hold for it.
    apart: dict[str, tuple[str, str]] = field(default_factory=dict)

    def reason(self, method: str) -> tuple[str, str]:
        """Why a method's cell is what it is, and what to do instead."""
        return self.apart.get(method, (self.why, self.instead))


def _row(msplora: str, lora2: str | None = None, lor2c: str | None = None) -> dict[str, str]:
    return {"msplora": msplora, "lora2": lora2 or msplora, "lor2c": lor2c or msplora}


_REQUANTISE = "dequantises, adds and quantises again; the error is logged"
_UNMERGEABLE = "the quantised format can't be written again"
_UNSERVED = {
    "lor2c": (
        "a path adds to a layer's output, for which a server's LoRA has no place; no weight can absorb it either",
        "answer with transformers: ziggurat beside it, or the folder that `ziggurat merge` writes, which needs neither "
        "ziggurat nor PEFT but trust_remote_code",
    )
}
_UNMERGED = {
    "lor2c": (
        "trains; a path is never merged",
        "keep the adapter beside the quantised model, or merge it beside the unquantised one (`ziggurat merge`)",
    )
}
_TWO_PROCESSES = (
    "tests/training/test_launch.py::test_two_processes_learn_what_one_learns",
    "tests/compare/test_two_processes.py::test_two_processes_train_what_one_trains",
)
_ON_PROCESSORS = (
    "two gloo processes on a CPU, by `ziggurat train` and in a loop of one's own, give the losses of one, and one "
    "process reloads the adapter; on GPUs untested; see docs/distributed.md"
)

FACTS: tuple[Fact, ...] = (
    Fact(
        "float16",
        "base",
        "float16, bfloat16",
        _row("yes"),
        "the adapter's factors stay float32",
        evidence=(_CONTRACTS + "test_half_precision_bases_get_float32_adapters",),
    ),
    Fact(
        "bitsandbytes",
        "base",
        "bitsandbytes 4 and 8 bit",
        _row("limited"),
        f"trains; a merge {_REQUANTISE}",
        "merge into the unquantised model (`ziggurat merge`) and quantise that",
        (_QUANTISED + "test_training_lowers_the_loss", _QUANTISED + "test_merging_reports_the_error_that_it_makes"),
        _UNMERGED,
    ),
    Fact(
        "hqq",
        "base",
        "HQQ",
        _row("limited"),
        f"trains; a merge {_REQUANTISE}",
        "merge into the unquantised model and quantise that",
        (_QUANTISED + "test_training_lowers_the_loss",),
        _UNMERGED,
    ),
    Fact(
        "torchao",
        "base",
        "torchao",
        _row("limited"),
        f"trains; a merge {_REQUANTISE}, only where transformers loaded the model by a TorchAoConfig",
        "load with TorchAoConfig instead of quantize_, or keep the adapter beside the model",
        (_QUANTISED + "test_bare_torchao_names_the_way_round",),
        _UNMERGED,
    ),
    Fact(
        "packed",
        "base",
        "GPTQ, AWQ and other packed formats",
        _row("limited"),
        f"trains by the linear's own forward, tried with a stand-in of that form; no merge: {_UNMERGEABLE}",
        "keep the adapter beside the model, or export it as plain LoRA",
        (_QUANTISED + "test_what_cannot_be_merged_refuses_whole",),
        {
            "lor2c": (
                "trains by the linear's own forward, tried with a stand-in of that form; a path is never merged",
                "keep the adapter beside the model",
            )
        },
    ),
    Fact(
        "offload",
        "base",
        "layers offloaded by accelerate (`device_map` with disk or cpu)",
        _row("yes"),
        "outputs, gradients and loading are those of a whole base; several accelerators untested",
        evidence=("tests/host/test_offload.py::test_an_adapter_computes_and_learns_as_beside_a_whole_base",),
    ),
    Fact(
        "trainer",
        "train",
        "Trainer, with resume and best model",
        _row("yes"),
        evidence=(
            _TRAINING + "test_a_resumed_run_is_bitwise_the_uninterrupted_one",
            _TRAINING + "test_the_best_model_is_loaded_at_the_end",
        ),
    ),
    Fact(
        "trl",
        "train",
        "TRL's SFTTrainer with peft_config",
        _row("yes"),
        evidence=(_TRAINING + "test_trl_makes_the_adapter_itself",),
    ),
    Fact("autocast", "train", "autocast (bf16, fp16)", _row("yes"), evidence=(_TRAINING + "test_autocast",)),
    Fact(
        "checkpointing",
        "train",
        "gradient checkpointing, one process",
        _row("yes"),
        evidence=(_TRAINING + "test_checkpointing_gives_the_same_gradients",),
    ),
    Fact(
        "compile",
        "train",
        "torch.compile without graph breaks",
        _row("yes"),
        evidence=(_TRAINING + "test_compile_without_graph_breaks",),
    ),
    Fact("ddp", "distributed", "DDP", _row("limited"), _ON_PROCESSORS, evidence=_TWO_PROCESSES),
    Fact(
        "ddp_reentrant",
        "distributed",
        "DDP with reentrant checkpointing",
        _row("no", "untested", "untested"),
        "a parameter that several layers share is marked ready twice, as one of LoR2C's with share=True would be",
        "gradient_checkpointing_kwargs={'use_reentrant': False}, transformers' default, or static_graph=True",
    ),
    Fact(
        "fsdp2",
        "distributed",
        "FSDP2",
        _row("limited"),
        f"{_ON_PROCESSORS}; in a loop of one's own shard the layers and then the root",
        evidence=_TWO_PROCESSES,
    ),
    Fact("fsdp1", "distributed", "FSDP1", _row("untested"), "nobody has tried", "use FSDP2 (fsdp_version: 2)"),
    Fact(
        "deepspeed",
        "distributed",
        "DeepSpeed ZeRO",
        _row("limited", "no", "limited"),
        "ZeRO-2 and 3 tried by hand in a loop of one's own, two processes on a CPU, never by `ziggurat train`; it "
        "frees gradients, by which LoRA² prunes, and holds weights that LoR2C's events would move: both are refused",
        "use DDP or FSDP2",
        evidence=("tests/training/test_launch.py::test_deepspeed_is_refused_what_it_cannot_do",),
    ),
    Fact(
        "tensor_parallel", "distributed", "tensor parallelism", _row("untested"), "nobody has tried", "use DDP or FSDP2"
    ),
    Fact(
        "peft",
        "use",
        "PEFT and transformers, where ziggurat is installed",
        _row("yes"),
        evidence=(_CONTRACTS + "test_an_adapter_reloads_bitwise", _CONTRACTS + "test_transformers_own_calls"),
    ),
    Fact(
        "mixed",
        "use",
        "several adapters in one batch",
        _row("yes"),
        evidence=(_CONTRACTS + "test_each_sample_with_its_own_adapter",),
    ),
    Fact(
        "merge",
        "use",
        "merge into the weights",
        _row("yes", "yes", "no"),
        "a path adds to a layer's output, past its norms: no weight can absorb it",
        "`ziggurat merge` writes LoR2C as a folder that brings its paths' code along",
        (_CONTRACTS + "test_merging_keeps_the_output",),
    ),
    Fact(
        "weighted",
        "use",
        "add_weighted_adapter",
        _row("yes", "no", "no"),
        "only a pyramid's sum keeps its form",
        "export both as plain LoRA and combine those",
        (_CONTRACTS + "test_weighted_sums_are_exact",),
    ),
    Fact(
        "plain_peft",
        "use",
        "PEFT without ziggurat",
        _row("limited", "limited", "no"),
        "after `ziggurat export`, exactly",
        "`ziggurat export` writes plain LoRA; for LoR2C keep ziggurat",
        ("tests/test_export.py",),
    ),
    Fact(
        "vllm",
        "use",
        "vLLM",
        _row("limited", "limited", "no"),
        "after `ziggurat export --serving`, of models that it marks for LoRA (decoders): one rank that vLLM allows (up "
        "to 512), no modules_to_save, no biases; its own runtime, on a CPU, gives Ziggurat's logits",
        "merge into the model where the adapter holds more than factor pairs",
        ("tests/test_export.py", "tests/servers/test_vllm.py", "tests/servers/test_runtimes.py"),
        _UNSERVED,
    ),
    Fact(
        "llama_cpp",
        "use",
        "llama.cpp",
        _row("limited", "limited", "no"),
        "after `ziggurat export --serving`, of decoders (it applies no adapter to encoders and classifiers), then its "
        "convert_lora_to_gguf.py; its own runtime gives Ziggurat's logits",
        "merge into the model and convert that",
        ("tests/test_export.py", "tests/servers/test_runtimes.py"),
        _UNSERVED,
    ),
)


def fact(key: str) -> Fact:
    """The row called `key`."""
    return next(row for row in FACTS if row.key == key)


def markdown() -> str:
    """The table as it stands in docs/combinations.md."""
    lines = []
    for section, title in SECTIONS.items():
        names = " | ".join(METHODS.values())
        lines += [f"| {title} | {names} | what to know |", "|---|" + "---|" * (len(METHODS) + 1)]
        for row in FACTS:
            if row.section == section:
                cells = " | ".join(row.cells[method] for method in METHODS)
                said = {"": (row.why, row.instead), **{f"{METHODS[name]}: ": text for name, text in row.apart.items()}}
                about = ". ".join(
                    who + "; otherwise: ".join(part for part in parts if part) for who, parts in said.items()
                )
                lines.append(f"| {row.what} | {cells} | {about} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def written_into(page: str) -> str:
    """The page with the table between its marks `<!-- table -->` and `<!-- end -->`."""
    head, _, rest = page.partition("<!-- table -->\n")
    return f"{head}<!-- table -->\n{markdown()}<!-- end -->{rest.partition('<!-- end -->')[2]}"


if __name__ == "__main__":
    import sys
    from pathlib import Path

    path = Path(sys.argv[1])
    path.write_text(written_into(path.read_text(encoding="utf-8")), encoding="utf-8")
