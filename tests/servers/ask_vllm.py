"""Run by a python that has vLLM: what vLLM says to each prompt with each adapter, and its log-probabilities.

    python ask_vllm.py JOB.json OUT.npz

The job: `model`, a folder; `adapters`, name -> folder; `refused`, the same, of adapters that can't be served and are
asked first; `max_lora_rank`; `own_code`, whether the folder's code is to run; `prompts`, lists of token ids; `steps`,
how many tokens are to follow; `vocabulary`, its size. The answer, for each adapter, or "base" if there is none:
`<name>/<number of the prompt>/tokens` (steps), `.../logprobs` (steps, vocabulary) and, of exports, `<name>/least`, the
lowest max_lora_rank with which vLLM takes them; `<name>/refused`, vLLM's words. All is asked in one call, so that
batches mix the adapters.
"""

import json
import os
import sys
from pathlib import Path
from typing import get_args

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")

import numpy as np
from vllm import LLM, SamplingParams
from vllm.config.lora import LoRAConfig, MaxLoRARanks
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest


def least_rank(adapter: str) -> int:
    helper = PEFTHelper.from_local_dir(adapter, max_position_embeddings=256)
    for rank in get_args(MaxLoRARanks):
        try:
            helper.validate_legal(LoRAConfig(max_lora_rank=rank))
        except ValueError as error:
            if "rank" not in str(error):
                raise
        else:
            return rank
    raise ValueError(f"{adapter}: refused at every rank")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    adapters = job["adapters"]
    plain = {name: folder for name, folder in adapters.items() if "export" in Path(folder).name}
    answers = {f"{name}/least": np.array(least_rank(folder)) for name, folder in plain.items()}
    lora = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": job["max_lora_rank"]} if adapters else {}
    llm = LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_logprobs=job["vocabulary"],
        enable_prefix_caching=False,
        trust_remote_code=job["own_code"],
        **lora,
    )
    requests = {name: LoRARequest(name, number, adapters[name]) for number, name in enumerate(adapters, start=1)}
    asked = [
        (f"{name}/{number}", {"prompt_token_ids": prompt}, requests.get(name))
        for number, prompt in enumerate(job["prompts"])
        for name in adapters or ["base"]
    ]
    for number, (name, folder) in enumerate(job["refused"].items(), start=len(adapters) + 1):
        try:
            llm.generate({"prompt_token_ids": job["prompts"][0]}, lora_request=LoRARequest(name, number, folder))
        except ValueError as error:
            answers[f"{name}/refused"] = np.array(list(str(error).encode()))
    outputs = llm.generate(
        [prompt for _, prompt, _ in asked],
        SamplingParams(max_tokens=job["steps"], temperature=0.0, ignore_eos=True, logprobs=job["vocabulary"]),
        lora_request=[request for _, _, request in asked],
        use_tqdm=False,
    )
    for (key, _, _), output in zip(asked, outputs, strict=True):
        completion = output.outputs[0]
        answers[f"{key}/tokens"] = np.array(completion.token_ids)
        answers[f"{key}/logprobs"] = np.array(
            [[row[token].logprob for token in range(job["vocabulary"])] for row in completion.logprobs]
        )
    np.savez(sys.argv[2], **answers)


if __name__ == "__main__":
    main()
