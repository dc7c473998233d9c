"""What the door (`ziggurat_door`) adds to `import torch`: the time of its entry point, in the process it runs in.

    python benchmarks/door.py [rounds]

Each round is a fresh interpreter. Beside it, what its finder adds to each later import of some other module.
"""

import statistics
import subprocess
import sys

PROGRAM = """
import importlib.metadata, json, sys, time
spent = 0.0
load = importlib.metadata.EntryPoint.load

def timed(call):
    def run(*args):
        global spent
        begin = time.perf_counter()
        try:
            return call(*args)
        finally:
            spent += time.perf_counter() - begin
    return run

def loaded(entry):
    call = timed(load)(entry)
    return timed(call) if entry.value == "ziggurat_door:enter" else call

importlib.metadata.EntryPoint.load = loaded
begin = time.perf_counter()
import torch
whole = time.perf_counter() - begin
finder = next(finder for finder in sys.meta_path if type(finder).__module__ == "ziggurat_door")
begin = time.perf_counter()
for _ in range(10000):
    finder.find_spec("json.encoder")
print(json.dumps([spent, whole, (time.perf_counter() - begin) / 10000]))
"""


def main() -> None:
    import json

    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 11
    rows = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout))
    door, whole, finding = (statistics.median(column) for column in zip(*rows, strict=True))
    share = statistics.median(a / b for a, b, _ in rows)
    print(f"the door {door * 1e3:.2f} ms of import torch's {whole * 1e3:.0f} ms: {share:.2%} (median of {rounds})")
    print(f"each later import of another module: {finding * 1e6:.2f} microseconds more")


if __name__ == "__main__":
    main()
