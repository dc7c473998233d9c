"""Functions that older or limited versions of the host lack, for their tests. docs/guarantees.md says the same."""

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from transformers.generation import GenerationMixin
from transformers.integrations import moe

from ziggurat.host.older import SHARES
from ziggurat.host.supported import required_peft

PEFT, TRANSFORMERS = Version(peft.__version__), Version(transformers.__version__)
TORCH = Version(torch.__version__)

#: transformers' own add_adapter, load_adapter and the like; test_versions.py tests the error that they end in.
transformers_calls = pytest.mark.skipif(required_peft() is not None, reason="this transformers asks for a newer PEFT")
#: PEFT's own classes around models of a task read a setting that transformers logs a warning about.
compiles_whole = pytest.mark.skipif(Version("0.21") > PEFT, reason="a log call in this PEFT's forward breaks graphs")
#: Of models of a task in one graph.
compiles = pytest.mark.skipif(Version("2.7") > TORCH, reason="this torch doesn't compile the context in PEFT's forward")
#: What check_saved_whole and check_finds_parameters refuse; test_versions.py tests the refusals.
saves_whole = pytest.mark.skipif(Version("0.21") > PEFT, reason="this PEFT saves the factors of an adapter alone")
#: Linears that read one input; without, each of them goes down alone.
shares = pytest.mark.skipif(not SHARES, reason="this torch doesn't tell one checkpoint from another")
#: Its experts in a compiled graph: their backward loops over sizes that a compiler doesn't know.
compiles_experts = pytest.mark.skipif(
    not hasattr(moe, "_grouped_mm_fallback_backward_fake"), reason="its experts' backward can't be compiled"
)
#: PEFT's backends for quantised weights.
quantised = pytest.mark.skipif(Version("0.20") > PEFT, reason="this PEFT neither reads nor writes quantised weights")


def skip_where_lora_fails(task_type: str | None) -> None:
    """Skip a test that puts PEFT's own LoRA into a model for `task_type` where this PEFT can't; our methods it can."""
    lost = not hasattr(GenerationMixin, "_prepare_encoder_decoder_kwargs_for_generation")
    if task_type == "SEQ_2_SEQ_LM" and lost and Version("0.21.2") > PEFT:
        pytest.skip("this PEFT asks sequence-to-sequence models for a method that this transformers has lost")
