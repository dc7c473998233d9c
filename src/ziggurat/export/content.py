"""A check that an adapter's file has all tensors that its config asks for."""

from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict

from ziggurat.errors import ExportError
from ziggurat.host.base.vocabulary import embedding_names
from ziggurat.host.plain import bare
from ziggurat.host.saved.folder import tensor_shapes


def check_complete(folder: str | Path, model: PeftModel) -> list[str]:
    """Names in the adapter's file that the model has no place for.

    Raises:
        ExportError: the file lacks a tensor of the adapter, which PEFT would have left as it was made.
    """
    held = set(tensor_shapes(folder))
    needed = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    beside = embedding_names(bare(model), held | needed)  # PEFT saves them or leaves them out
    lacking = sorted(needed - held - beside)
    if lacking:
        raise ExportError(
            f"{folder} lacks {len(lacking)} of the {len(needed)} tensors its config asks for ({lacking[0]}, ...): is "
            "its adapter_config.json another adapter's?"
        )
    # PEFT writes the trained rows of a tied embedding twice.
    return sorted(name for name in held - needed - beside if not name.endswith(".trainable_tokens_delta"))
