"""Axolotl trains, loads and merges a method by its own commands, on a tiny model. `.ci/clients` runs it."""

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from training_tables import save_tiny_llama
from transformers import AutoTokenizer

pytestmark = pytest.mark.skipif(
    os.environ.get("ZIGGURAT_CLIENT") != "axolotl", reason="no Axolotl of its own: .ci/clients"
)
CONFIG = {
    "base_model": "llama",
    "adapter": "msplora",
    "lora_r": 8,
    "lora_target_modules": ["q_proj", "v_proj"],
    "ziggurat": {"even_scales": True},
    "datasets": [{"path": "train.jsonl", "type": "completion", "ds_type": "json"}],
    "dataset_prepared_path": "prepared",
    "output_dir": "out",
    "sequence_len": 48,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "learning_rate": 0.1,
    "optimizer": "adamw_torch",
    "lr_scheduler": "constant",
    "val_set_size": 0,
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "use_cpu": True,
    "attn_implementation": "eager",
    "dataset_num_proc": 1,
}


def axolotl(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    line = [
        sys.executable,
        "-m",
        "axolotl.cli.main",
        command,
        "config.yaml",
        *(["--launcher", "python"] if command == "train" else []),
    ]
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True)


def test_axolotl_trains_and_merges_the_method(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "llama")
    (tmp_path / "train.jsonl").write_text(
        "\n".join([json.dumps({"text": "the film is good and the film is fine"})] * 16)
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    done = axolotl(tmp_path, "train")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["even_scales"], config["r"]) == ("MSPLORA", True, 8)
    assert any(":B_global" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))

    done = axolotl(tmp_path, "merge-lora")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (load_file(tmp_path / at / "model.safetensors")[name] for at in ("llama", "out/merged"))
    assert (before.float() - after.float()).abs().max() > 1e-3  # by its default it writes the base, with exit code 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"merge_method": "memory_efficient"}, "would write the base without the adapter"),
        ({"trl": {"use_vllm": True}}, "Set trl.vllm_lora_sync: true"),
        ({"adapter": "lora"}, "name a method, one of"),
    ],
)
def test_what_would_go_on_without_the_adapter_is_refused(more: dict[str, object], message: str) -> None:
    from axolotl.utils.dict import DictDefault  # pyright: ignore[reportMissingImports]

    from ziggurat.errors import ConfigError
    from ziggurat.integrations.axolotl import ZigguratPlugin

    with pytest.raises(ConfigError, match=message):
        ZigguratPlugin().register(DictDefault({**CONFIG, **more}))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """vLLM's own server of a small Llama, which takes adapters at run time: the folder of the base, and the address."""
    if not os.environ.get("ZIGGURAT_VLLM_PYTHON"):
        pytest.skip("no vLLM: .ci/clients vllm makes one")
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("server")
    save_tiny_llama(folder / "tokens")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, max_position_embeddings=256, initializer_range=0.1, **sizes)
    LlamaForCausalLM(config).save_pretrained(str(folder / "llama"))
    AutoTokenizer.from_pretrained(str(folder / "tokens")).save_pretrained(str(folder / "llama"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # As `vllm serve`, whose first lines ask for a distribution called vllm, which builds for processors lack.
    command = [os.environ["ZIGGURAT_VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder / "llama")]
    command += f"--port {port} --enable-lora --max-lora-rank 16 --dtype float32 --max-model-len 256".split()
    command.append("--enforce-eager")
    allowed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env = {**os.environ, **allowed, "VLLM_SERVER_DEV_MODE": "1", "ZIGGURAT_CACHE": str(folder / "cache")}
    with (folder / "log").open("w") as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(1200):
                if process.poll() is not None:
                    raise AssertionError((folder / "log").read_text()[-4000:])
                with suppress(requests.ConnectionError):
                    if requests.get(f"{url}/health", timeout=5).status_code == 200:
                        break
                time.sleep(1)
            yield folder / "llama", url
        finally:
            process.terminate()


def test_grpo_sends_the_adapter_alone_to_vllm(server: tuple[Path, str]) -> None:
    """Axolotl's own function, by `vllm_lora_sync`: after each step the server answers as the policy does."""
    from axolotl.core.trainers.grpo.async_trainer import AsyncGRPOTrainer  # pyright: ignore[reportMissingImports]
    from peft import get_peft_model
    from transformers import LlamaForCausalLM

    from ziggurat import MSPLoraConfig

    base, url = server
    torch.manual_seed(0)
    config = MSPLoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_weights=False)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(str(base)), config).eval()
    client = SimpleNamespace(base_url=url, model=str(base))
    sends = SimpleNamespace(mode="server", accelerator=Accelerator(cpu=True), model=model, vllm_client=client)
    trainer: Any = SimpleNamespace(vllm_generation=sends, args=SimpleNamespace(vllm_server_timeout=60))
    trainer.model_wrapped, trainer._vllm_lora_alias = model, None
    ids = torch.randint(5, 64, (1, 9), generator=torch.Generator().manual_seed(3))

    def asked(name: str) -> list[float]:
        """The log-probabilities of the five tokens that are likeliest next."""
        body = {"model": name, "prompt": ids[0].tolist(), "max_tokens": 1, "temperature": 0, "logprobs": 5}
        answer = requests.post(f"{url}/v1/completions", json=body, timeout=60).json()
        return sorted(answer["choices"][0]["logprobs"]["top_logprobs"][0].values(), reverse=True)[:5]

    answers = [asked(str(base))]
    for _ in range(2):
        AsyncGRPOTrainer._sync_lora_adapter(trainer)
        with torch.no_grad():
            ours = model(input_ids=ids).logits[0, -1].log_softmax(-1).topk(5).values
        answers.append(asked(client.model))
        assert answers[-1] == pytest.approx(ours.tolist(), abs=2e-4)
        with torch.no_grad():  # a step of training
            for name, parameter in model.named_parameters():
                if "B_layer" in name:
                    parameter.mul_(3)
    assert min(abs(a[0] - b[0]) for a, b in itertools.combinations(answers, 2)) > 1e-2
