"""`ziggurat export` and `merge`: an adapter in another form."""

from pathlib import Path
from typing import Annotated

import typer

from ziggurat.host.bars import without_bars
from ziggurat.terminal import say

from .folder import adapter_of_a_run, check_hub, push, refuse_taken
from .options import Private, Push

Adapter = Annotated[Path, typer.Argument(help="Adapter folder.")]
Out = Annotated[Path, typer.Argument(help="Folder to write.")]
Base = Annotated[str | None, typer.Option(help="The base model, if the adapter's config names a wrong one.")]


def export(
    adapter: Adapter,
    out: Out,
    serving: Annotated[
        bool, typer.Option("--serving", help="The form that PEFT, vLLM and llama.cpp all scale alike.")
    ] = False,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="As --serving, and beside it adapter.gguf, by llama.cpp's own converter.")
    ] = False,
    base: Base = None,
    push_to_hub: Push = None,
    private: Private = False,
) -> None:
    """Write an adapter as plain LoRA, which stock PEFT loads."""
    from ziggurat import export as exporting
    from ziggurat.export.gguf import ADAPTER, check_convertible, converter, modelfile, write_gguf
    from ziggurat.host.saved.folder import adapter_config

    refuse_taken(out)
    check_hub(push_to_hub)
    serving = serving or gguf
    if gguf:  # refuses before anything is written
        converter()
        check_convertible(adapter_config(adapter), base)
    loaded = adapter_of_a_run(adapter, base)
    if loaded is not None:
        written = exporting.export_model(loaded.model, out, serving=serving, tokenizer=loaded.whole_tokenizer)
    else:
        written = exporting.export(adapter, out, serving=serving, base_model=base)
    say(f"plain LoRA of rank {written.rank} on {written.modules} linear layers written to {out}")
    if written.cost is not None:
        say(f"note: {written.cost}")
    if written.only_for_vllm:
        say("note: for vLLM alone: PEFT would leave the experts out, since it doesn't look for them under vLLM's names")
    if serving:
        say(f"serve it with --max-lora-rank {written.rank}")
    if gguf:
        model = base or str(adapter_config(out).base_model_name_or_path)
        say(f"llama.cpp's form of it is {write_gguf(out, model)}")
        (out / "Modelfile").write_text(modelfile(model, ADAPTER), encoding="utf-8")
    push(out, push_to_hub, private)


def merge(adapter: Adapter, out: Out, base: Base = None, push_to_hub: Push = None, private: Private = False) -> None:
    """Merge an adapter into its model and write the whole model with its tokenizer."""
    from ziggurat import export as exporting

    refuse_taken(out)
    check_hub(push_to_hub)
    loaded = adapter_of_a_run(adapter, base)
    with without_bars():
        if loaded is not None:
            exporting.merge_model(loaded.model, out, loaded.whole_tokenizer)
        else:
            exporting.merge(adapter, out, base_model=base)
    push(out, push_to_hub, private)
    if any(out.glob("modeling_*.py")):
        say(f"model with its paths written to {out}: load it with trust_remote_code=True, after reading its code")
    else:
        say(f"merged model written to {out}")
