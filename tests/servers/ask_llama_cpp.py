"""Run by a python that has llama-cpp-python: what llama.cpp computes after each token of each prompt.

    python ask_llama_cpp.py JOB.json OUT.npz

The job: `models`, name -> {"model": GGUF, "adapter": GGUF or null, "texts": [{"prompt": how many, "ids": token ids}]}.
A prompt is computed in one batch, what follows it token by token. The answer: `<name>/<number of the text>`, logits
(tokens, vocabulary).
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

job = json.loads(Path(sys.argv[1]).read_text())
answers = {}
for name, asked in job["models"].items():
    # Keys and values are kept in float16 unless told otherwise, which would be the larger error.
    llama = llama_cpp.Llama(
        asked["model"],
        lora_path=asked["adapter"],
        logits_all=True,
        n_ctx=256,
        n_threads=1,
        n_threads_batch=1,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    for number, text in enumerate(asked["texts"]):
        llama.reset()
        llama.eval(text["ids"][: text["prompt"]])
        for token in text["ids"][text["prompt"] :]:
            llama.eval([token])
        answers[f"{name}/{number}"] = np.array(llama.scores[: len(text["ids"])])
    llama.close()
np.savez(sys.argv[2], **answers)
