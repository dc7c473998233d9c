"""The Triton kernels compiled for GPUs that are not here: registers, spills, shared memory, occupancy, bytes.

    python -m benchmarks.kernel_table --out benchmarks/kernel_table.jsonl > benchmarks/kernel_table.md

Triton compiles for any target and its wheel brings ptxas and cuobjdump. Activations are bf16, factors float32 (bf16
above rank 32), and the compiler gets the hints that it gets when the kernels run: widths and pointers are multiples
of 16, ranks only where they are. "instructions" are those of the loop, in warps' instructions for each 32 entries of
(tokens, d). Exit code 1 if a kernel spills or less than a quarter of an SM's warps fit.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]


class Target(NamedTuple):
    """What an SM (a compute unit) holds: shared memory, warps, and the largest share of it that a block may take."""

    cards: str
    shared: int
    block: int
    warps: int


TARGETS = {
    "sm_80": Target("A100", 164, 163, 64),
    "sm_86": Target("RTX 3090, A40", 100, 99, 48),
    "sm_89": Target("RTX 4090, L40S", 100, 99, 48),
    "sm_90": Target("H100, H200", 228, 227, 64),
    "sm_100": Target("B200", 228, 227, 64),
    "sm_120": Target("RTX 5090", 100, 99, 48),
    "gfx942": Target("MI300X", 64, 64, 32),
}
RANKS = (14, 30, 60, 120)  # none a multiple of 16, which is the harder case
#: Name -> the kernel, and whether entries are dropped.
KERNELS = {
    "h = drop(x) A'": ("down", True),
    "dx = drop(dh A)": ("up", True),
    "dA = dh' drop(x)": ("outer", True),
    "h = x A'": ("down", False),
    "dx = dh A": ("up", False),
    "dA = dh' x": ("outer", False),
}
#: Of (tokens, d), for the bytes.
TOKENS, D = 4096, 2048
LEAST_OCCUPANCY = 0.25
HEAD = """# The Triton kernels, compiled

    python -m benchmarks.kernel_table --out benchmarks/kernel_table.jsonl > benchmarks/kernel_table.md

No GPU took part: {count} kernels compiled by Triton {triton}'s own ptxas; {wrong} of them spill on an NVIDIA GPU or
leave it less than a quarter of an SM's warps. A cell is registers a thread (+ stack, which is what spills), shared
memory, and the share of an SM's warps that fit. Activations bf16, factors float32 (bf16 above rank 32). "MiB (least)"
are the bytes that all programs read and write for {tokens} tokens of {d}, most of them in the L2 cache where a factor
is read again, and those with each operand moved once. "instructions" are warps' instructions of the loop for each 32
entries of (tokens, d). gfx942 is compiled to see that it can be; `runs_on` takes NVIDIA's GPUs alone."""


def compiled(name: str, rank: int, target: str) -> Any:
    """A kernel compiled for a target with its tile, as Triton's runtime would."""
    import triton.language as tl
    from benchmarks.gpu.bare import triton_product
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel, drops = KERNELS[name]
    kernels = triton_product.kernels
    tile = kernels.tile(kernel, rank)
    function = getattr(kernels, kernel)
    constants: dict[str, Any] = {"DROP": drops, "DTYPE": tl.bfloat16, "RANK": kernels.padded(rank)}
    constants |= {"TOKENS": tile.TOKENS, "WIDTH": tile.WIDTH} | ({} if drops else {"seed": None})
    factor = "*fp32" if rank <= kernels.NARROW else "*bf16"
    summed = "*bf16" if kernel == "up" else "*fp32"
    pointers = {"x": "*bf16", "h": "*bf16", "w": factor, "out": summed, "seed": "*i64"}
    wide = {"columns", "x_row", "w_rank", "per_split", *(("rank", "h_row") if rank % 16 == 0 else ())}
    signature, hints = {}, {}
    for place, argument in enumerate(function.arg_names):
        signature[argument] = pointers.get(argument, "fp32" if argument == "scale" else "i32")
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in pointers or argument in wide:
            hints[place,] = [["tt.divisibility", 16]]
    values = {(i,): constants[n] for i, n in enumerate(function.arg_names) if n in constants}
    source = ASTSource(function, signature, values, hints)
    gpu = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    return compile(source, target=gpu, options={"num_warps": tile.num_warps, "num_stages": tile.num_stages})


def measured(case: tuple[int, str, str]) -> dict[str, Any]:
    """The row of one kernel, rank and target."""
    from benchmarks.gpu import traffic

    warnings.simplefilter("ignore")
    rank, name, target = case
    kernel, _ = KERNELS[name]
    tile = traffic.kernels.tile(kernel, rank)
    row: dict[str, Any] = {"kernel": name, "rank": rank, "target": target, "tile": list(tile)}
    try:
        binary = compiled(name, rank, target)
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {error}"[:200]}
    resources = of_cubin(binary.asm["cubin"]) if "cubin" in binary.asm else of_amdgcn(binary.asm["amdgcn"])
    row |= resources | {"shared": binary.metadata.shared}
    row["products"] = len(re.findall(r"mma|mfma", binary.asm.get("ptx", binary.asm.get("amdgcn", ""))))
    row["occupancy"] = occupancy(target, row["registers"], row["shared"], tile.num_warps)
    if "loop" in row:
        row["instructions"] = round(row.pop("loop") * tile.num_warps * 32 / (tile.TOKENS * tile.WIDTH), 1)
    counted = getattr(traffic, kernel)(TOKENS, D, rank)
    row["MiB"], row["MiB least"] = round(counted.moved / 2**20, 1), round(counted.least / 2**20, 1)
    return row


def of_cubin(cubin: bytes) -> dict[str, int]:
    """Registers and stack of a thread, and the length of the longest loop."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        texts = [
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        ]
    usage = dict(re.findall(r"(REG|STACK):(\d+)", texts[0]))
    places = [(int(at, 16), text) for at, text in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", texts[1], re.M)]
    begins = {at: number for number, (at, _) in enumerate(places)}
    loops = [0]
    for number, (at, text) in enumerate(places):
        jump = re.search(r"\bBRA(?:\.\S+)? .*?(0x[0-9a-f]+)", text)
        if jump and int(jump[1], 16) < at:
            loops.append(number - begins[int(jump[1], 16)] + 1)
    return {"registers": int(usage["REG"]), "stack": int(usage["STACK"]), "loop": max(loops)}


def of_amdgcn(text: str) -> dict[str, int]:
    """Vector registers and stack of a thread."""
    usage = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", text))
    return {"registers": int(usage["vgpr_count"]), "stack": int(usage["private_segment_fixed_size"])}


def occupancy(target: str, registers: int, shared: int, warps: int) -> float:
    """The share of an SM's warps that fit, by registers, shared memory and the number of blocks."""
    limits = TARGETS[target]
    if shared > limits.block * 1024:
        return 0.0
    if target.startswith("sm_"):
        by_registers = 4 * (65536 // 4 // (-(-registers * 32 // 256) * 256))
        by_shared = limits.shared * 1024 // (shared + 1024) * warps
    else:
        by_registers = 4 * min(8, 512 // max(1, -(-registers // 8) * 8))
        by_shared = limits.shared * 1024 // max(1, shared) * warps
    fitting = min(by_registers // warps * warps, by_shared, limits.warps // warps * warps, 32 * warps)
    return round(fitting / limits.warps, 3)


def bad(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows on NVIDIA GPUs that spill, hold too few warps, or did not compile; `runs_on` takes no others."""
    return [
        row
        for row in rows
        if row["target"].startswith("sm_") and ("error" in row or row["stack"] or row["occupancy"] < LEAST_OCCUPANCY)
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """One table for each kernel: a row a rank, a cell a target, registers (+ spilled bytes), shared KiB, occupancy."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = []
    for name in dict.fromkeys(row["kernel"] for row in rows):
        mine = [row for row in rows if row["kernel"] == name]
        lines += [f"\n## {name.replace(chr(39), 'ᵀ')}: `{KERNELS[name][0]}`\n"]
        lines += [f"| rank | tile, warps, stages | {' | '.join(targets)} | instructions, sm_90 | MiB (least) |"]
        lines += ["|--:|---|" + "---|" * len(targets) + "--:|--:|"]
        for rank in dict.fromkeys(row["rank"] for row in mine):
            cells = {row["target"]: row for row in mine if row["rank"] == rank}
            any_of = next(iter(cells.values()))
            tokens, width, warps, stages = any_of["tile"]
            shown = [cell(cells[target]) for target in targets if target in cells]
            count = cells.get("sm_90", {}).get("instructions", "")
            traffic = next((f"{row['MiB']} ({row['MiB least']})" for row in cells.values() if "MiB" in row), "")
            lines.append(
                f"| {rank} | {tokens} x {width}, {warps}, {stages} | {' | '.join(shown)} | {count} | {traffic} |"
            )
    return "\n".join(lines) + "\n"


def cell(row: dict[str, Any]) -> str:
    if "error" in row:
        return "does not compile"
    spilled = f" + {row['stack']} B" if row["stack"] else ""
    return f"{row['registers']}{spilled}, {row['shared'] / 1024:.0f} K, {row['occupancy']:.0%}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; rows that it has are not compiled again")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--ranks", nargs="*", type=int, default=list(RANKS))
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    cases: list[tuple[int, str, str]] = list(itertools.product(given.ranks, KERNELS, given.targets))
    given.out.touch()
    rows = {key(row): row for row in map(json.loads, given.out.read_text(encoding="utf-8").splitlines())}
    with tempfile.TemporaryDirectory() as cache, given.out.open("a", encoding="utf-8") as file:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(given.processes) as pool:
            for row in pool.map(measured, (case for case in cases if case not in rows)):
                rows[key(row)] = row
                print(json.dumps(row), file=file, flush=True)
    table = [rows[case] for case in cases]
    wrong = bad(table)
    print(HEAD.format(count=len(table), triton=metadata.version("triton"), wrong=len(wrong), tokens=TOKENS, d=D))
    print(markdown(table), end="")
    return int(bool(wrong))


def key(row: dict[str, Any]) -> tuple[int, str, str]:
    return row["rank"], row["kernel"], row["target"]


if __name__ == "__main__":
    sys.exit(main())
