"""PEFT's benchmark end to end without a GPU and a hub: its own run.py on a tiny untrained Llama and made-up data.

    python benchmarks/method_comparison/stand_in.py peft [EXPERIMENT]...

Shows that each experiment's config loads, trains, generates, is scored and logged by PEFT's scripts; the scores mean
nothing. Replaced: the device, the data sets, the model, and a check that the base's loss on Wikipedia is that of a
real model.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from run import HERE, experiments, table

TESTS = Path(__file__).parents[2] / "tests"
SETTINGS = {
    "dtype": "float32",
    "max_seq_length": 48,
    "batch_size": 2,
    "batch_size_eval": 2,
    "max_steps": 4,
    "eval_steps": 2,
    "generation_kwargs": {"max_length": 60, "max_new_tokens": 4},
    "query_template": "{query}",
}
#: Run in the folder of PEFT's scripts, before their run.py.
BEFORE = """
import sys, types
import datasets, torch

sys.modules["bitsandbytes"] = types.SimpleNamespace(__version__="none", __path__=["site-packages"])
import peft.utils

peft.utils.infer_device = lambda: "cuda"
import utils

del sys.modules["bitsandbytes"]  # PEFT asks whether it is there
utils.device, utils.init_accelerator, utils.get_system_info = "cpu", lambda: 0, dict
rows = {"query": ["the film is good"] * 60, "response": ["The answer is: 4"] * 60}
questions = datasets.Dataset.from_dict({"question": rows["query"], "answer": ["#### 4"] * 60})
data = {
    "meta-math/MetaMathQA": datasets.DatasetDict(
        train=datasets.Dataset.from_dict({**rows, "type": rows["query"], "original_question": rows["query"]})
    ),
    "openai/gsm8k": datasets.DatasetDict(dict.fromkeys(("train", "test"), questions)),
}
import data as theirs

theirs.load_dataset = lambda name, *_, **__: data[name]
theirs.get_wiki_small = lambda: ["the film is very good"] * 2
source = open("run.py").read()
assert "assert 1 < wiki_loss_before < 2" in source
code = compile(source.replace("assert 1 < wiki_loss_before < 2", "assert 0 < wiki_loss_before"), "run.py", "exec")
torch.cuda.max_memory_reserved = lambda: 0
sys.argv = ["run.py", "-v", sys.argv[1]]
exec(code, {"__name__": "__main__", "__file__": "run.py"})
"""


def main() -> None:
    sys.path[:0] = [str(TESTS), str(TESTS / "training")]
    from training_tables import save_tiny_llama

    checkout, chosen = Path(sys.argv[1]).resolve(), sys.argv[2:] or experiments()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "MetaMathQA"
        shutil.copytree(checkout / "method_comparison" / "MetaMathQA", place)
        save_tiny_llama(Path(folder) / "llama")
        (place / "before.py").write_text(BEFORE, encoding="utf-8")
        for name in chosen:
            experiment = place / "experiments" / name
            shutil.copytree(HERE / name, experiment)
            (experiment / "training_params.json").write_text(json.dumps({**SETTINGS, "model_id": f"{folder}/llama"}))
            subprocess.run([sys.executable, "before.py", f"experiments/{name}"], cwd=place, check=True)
            written = sorted(place.glob(f"*/{name.replace('/', '--')}*.json"))
            status = [json.loads(file.read_text())["train_info"]["status"] for file in written]
            assert status == ["success"], (name, status)
        print(table(place))


if __name__ == "__main__":
    main()
