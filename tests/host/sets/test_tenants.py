"""Several adapters on common tensors: trained together, saved as a set, each loaded by itself."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file
from torch.optim import AdamW

import versions
from methods_table import logits, zoo_config
from tolerance import assert_models_agree
from ziggurat import add_tenants, hotswap_adapter, save_tenants, share
from ziggurat.analysis import collect
from ziggurat.errors import ConfigError, ExportError
from ziggurat.export import export_model
from ziggurat.host.older import check_saved_whole
from zoo import ZOO

pytestmark = versions.saves_whole

LLAMA, BERT = ZOO["llama"], ZOO["bert"]
WEIGHTS = "adapter_model.safetensors"


def two(method: str = "msplora", model: str = "llama", **fields: object) -> PeftModel:
    """A model with the adapters "films" and "books", which share what their layers share and differ in all else."""
    torch.manual_seed(0)
    made = get_peft_model(ZOO[model].build(), zoo_config(method, model, init_weights=False, **fields), "films")
    made.add_adapter("books", zoo_config(method, model, init_weights=False, **fields))
    share(made, ["films", "books"])
    return made


def parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


@pytest.mark.parametrize("method", ["msplora", "tiedlora"])
def test_a_mixed_batch_gives_each_tensor_the_gradient_of_its_own_samples(method: str) -> None:
    model = two(method, "bert", modules_to_save=["classifier"]).double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = BERT.inputs()
    model(**inputs, adapter_names=["films", "books"]).logits.square().sum().backward()
    mixed = {name: p.grad.clone() for name, p in parameters(model).items() if p.grad is not None}
    assert mixed.keys() == parameters(model).keys()
    model.zero_grad()
    for row, name in enumerate(("films", "books")):
        model.set_adapter(name)
        model(**{key: value[row : row + 1] for key, value in inputs.items()}).logits.square().sum().backward()
    share(model, ["films", "books"])
    for name, p in parameters(model).items():
        assert p.grad is not None
        assert torch.allclose(mixed[name], p.grad, rtol=1e-9, atol=1e-12), name


def test_each_adapter_has_its_own_optimiser_state_and_waits_for_its_samples() -> None:
    model = two().train()
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in parameters(model).items()}
    for names in (["films", "films"], ["films", "films"], ["films", "books"]):
        optimizer.zero_grad()
        model(**LLAMA.inputs(), adapter_names=names).logits.square().mean().backward()
        optimizer.step()
        if names == ["films", "films"]:
            still = {name for name, p in parameters(model).items() if torch.equal(p, before[name])}
            assert still == {name for name in before if ".books." in name and name.endswith("_layer")}
    steps = {name: int(optimizer.state[p]["step"]) for name, p in parameters(model).items()}
    assert {n for name, n in steps.items() if ".books." in name and name.endswith("_layer")} == {1}
    assert {n for name, n in steps.items() if ".films." in name or not name.endswith("_layer")} == {3}


def test_training_on_mixed_batches_refuses_what_would_train_otherwise() -> None:
    model = two().train()
    model.set_adapter("films")
    with pytest.raises(ValueError, match="adapter 'books' isn't active"):
        model(**LLAMA.inputs(), adapter_names=["films", "books"])
    share(model, ["films", "books"])
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="with gradient checkpointing"):
        model(**LLAMA.inputs(), adapter_names=["films", "books"])
    model.add_adapter("small", zoo_config("msplora", "llama", r=2))
    with pytest.raises(ConfigError, match="adapter 'small' has no tensor like bank_msplora"):
        share(model, ["films", "small"])
    with pytest.raises(ConfigError, match="no such tier or tensor"):
        share(model, ["films", "books"], ["globl"])
    with pytest.raises(ConfigError, match="no adapter 'c'; it has films, books, small"):
        share(model, ["films", "c"])


@pytest.mark.parametrize("method", ["msplora", "sharelora", "aslora"])
def test_a_set_holds_common_tensors_once_and_each_adapter_loads_by_itself(method: str, tmp_path: Path) -> None:
    model = two(method).eval()
    sizes = save_tenants(model, tmp_path / "set")
    bank = load_file(tmp_path / "set" / "bank.safetensors")
    assert sizes == {
        "bank.safetensors": (tmp_path / "set" / "bank.safetensors").stat().st_size,
        **{name: (tmp_path / "set" / name / WEIGHTS).stat().st_size for name in ("films", "books")},
    }
    for name in ("films", "books"):
        model.set_adapter(name)
        expected = logits(model, LLAMA.inputs())
        model.save_pretrained(tmp_path / "whole", selected_adapters=[name])
        whole = load_file(tmp_path / "whole" / name / WEIGHTS)
        small = load_file(tmp_path / "set" / name / WEIGHTS)
        assert whole.keys() == bank.keys() | small.keys() and not bank.keys() & small.keys()
        for on_meta in (False, True):
            loaded = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "set" / name, low_cpu_mem_usage=on_meta).eval()
            assert torch.equal(logits(loaded, LLAMA.inputs()), expected)
        by_transformers = LLAMA.build()
        by_transformers.load_adapter(str(tmp_path / "set" / name))
        assert torch.equal(logits(by_transformers.eval(), LLAMA.inputs()), expected)
        rows = [c.singular_values for c in collect(tmp_path / "set" / name).components]
        of_whole = [c.singular_values for c in collect(tmp_path / "whole" / name).components]
        assert len(rows) == len(of_whole) and all((a == b).all() for a, b in zip(rows, of_whole, strict=True))
        export_model(loaded, tmp_path / f"plain-{name}")
        plain = PeftModel.from_pretrained(LLAMA.build(), tmp_path / f"plain-{name}").eval()
        assert_models_agree(logits(plain, LLAMA.inputs()), expected)
        other = "books" if name == "films" else "films"
        hotswap_adapter(loaded, tmp_path / "set" / other)
        model.set_adapter(other)
        assert torch.equal(logits(loaded, LLAMA.inputs()), logits(model, LLAMA.inputs()))
        assert_models_agree(logits(loaded.merge_and_unload(), LLAMA.inputs()), logits(model, LLAMA.inputs()))


def held_bytes(model: PeftModel) -> int:
    """Bytes of the storages in which the tensors of all adapters lie."""
    tensors = [tensor for name, tensor in model.state_dict().items() if "_factors" in name]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def logits_of(model: PeftModel, name: str) -> torch.Tensor:
    model.set_adapter(name)
    return logits(model.eval(), LLAMA.inputs())


def test_what_a_set_has_in_common_lies_in_memory_once(tmp_path: Path) -> None:
    tiers, folder = ["global", "mid", "A_layer"], tmp_path / "set"  # A_layer lies in its layer, the others in the bank
    model = two()
    share(model, ["films", "books"], tiers)
    save_tenants(model, folder, tiers=tiers)
    expected = {name: logits_of(model, name) for name in ("films", "books")}
    once = sum(t.numel() for file in folder.rglob("*.safetensors") for t in load_file(file).values())
    for on_meta in (False, True):
        loaded = PeftModel.from_pretrained(LLAMA.build(), folder / "films", "films")
        loaded.load_adapter(folder / "books", "books", low_cpu_mem_usage=on_meta)
        assert held_bytes(loaded) == 4 * once
        assert all(torch.equal(logits_of(loaded, name), logits) for name, logits in expected.items())
    moved = copy.deepcopy(loaded).double()
    assert held_bytes(moved) == 8 * once
    moved.delete_adapter("films")
    assert_models_agree(logits_of(moved.float(), "books"), expected["books"])
    torch.manual_seed(3)
    other = get_peft_model(LLAMA.build(), zoo_config("msplora", "llama", init_weights=False))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"'films' shares \d+ tensors with others of this model"):
        hotswap_adapter(loaded, tmp_path / "other", "films")
    # Other values of one adapter reach no other.
    state = {name: t + 1 for name, t in get_peft_model_state_dict(loaded, adapter_name="books").items()}
    set_peft_model_state_dict(loaded, state, adapter_name="books")
    assert torch.equal(logits_of(loaded, "films"), expected["films"])
    assert not torch.equal(logits_of(loaded, "books"), expected["books"])


def test_a_swap_that_would_change_the_other_adapters_is_refused(tmp_path: Path) -> None:
    model = two()
    save_tenants(model, tmp_path / "set")
    with torch.no_grad():
        for name, p in parameters(model).items():
            if "layer" in name.rpartition(":")[2]:
                p.add_(1)
    hotswap_adapter(model, tmp_path / "set" / "films", "films")  # the bank is the same
    torch.manual_seed(3)
    other = get_peft_model(LLAMA.build(), zoo_config("msplora", "llama", init_weights=False))
    other.save_pretrained(tmp_path / "other")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(
        ConfigError, match=r"'films' shares .* tensors with others of this model, and .* have other values"
    ):
        hotswap_adapter(model, tmp_path / "other", "films")
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_adding_and_removing_one_touches_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    save_tenants(two(), folder)
    torch.manual_seed(1)
    third = get_peft_model(LLAMA.build(), zoo_config("msplora", "llama", from_adapter=str(folder / "films")))
    with torch.no_grad():
        for p in parameters(third).values():
            p.normal_()
    third.eval().save_pretrained(tmp_path / "third")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    add_tenants(folder, {"c": tmp_path / "third"})
    assert all(file.read_bytes() == content for file, content in before.items())
    for file in (folder / "books").iterdir():
        file.unlink()
    (folder / "books").rmdir()
    loaded = PeftModel.from_pretrained(LLAMA.build(), folder / "c").eval()
    assert torch.equal(logits(loaded, LLAMA.inputs()), logits(third, LLAMA.inputs()))
    # Saved from the set it is whole again, and may be added to it again.
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / WEIGHTS).keys() == load_file(tmp_path / "third" / WEIGHTS).keys()
    add_tenants(folder, {"d": tmp_path / "again"})
    assert (folder / "d" / WEIGHTS).read_bytes() == (folder / "c" / WEIGHTS).read_bytes()


def test_an_adapter_without_its_bank_or_beside_another_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    save_tenants(two(), folder)
    bank = folder / "bank.safetensors"
    stranger = zoo_config("msplora", "llama", init_weights=False)
    get_peft_model(LLAMA.build(), stranger).save_pretrained(tmp_path / "stranger")
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError, match=r"adapter 's' doesn't build on the shared tensors of .*set: 16 differ"):
        add_tenants(folder, {"s": tmp_path / "stranger"})
    with pytest.raises(ExportError, match="has 'films' already"):
        add_tenants(folder, {"films": tmp_path / "stranger"})
    with pytest.raises(ConfigError, match="can't be the name"):
        add_tenants(folder, {"../x": tmp_path / "stranger"})
    assert sorted(folder.rglob("*")) == before
    save_file({name: t + 1 for name, t in load_file(bank).items()}, bank)
    for load in (
        lambda: PeftModel.from_pretrained(LLAMA.build(), folder / "films"),
        lambda: LLAMA.build().load_adapter(str(folder / "films")),
        lambda: collect(folder / "films"),
    ):
        with pytest.raises(
            ConfigError, match=r"adapter 'films' builds on a bank.safetensors with sha256 .* belongs to an"
        ):
            load()
    bank.unlink()
    with pytest.raises(
        ConfigError, match=r"adapter 'books' builds on a bank.safetensors .* isn't there. Copy the adapter"
    ):
        PeftModel.from_pretrained(LLAMA.build(), folder / "books")


def test_a_peft_that_would_leave_the_bank_unread_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BaseTuner, "_get_adapter_state_dict", raising=False)
    config = zoo_config("msplora", "llama")
    config.bank = {"sha256": "0" * 64}
    with pytest.raises(ConfigError, match=r"an adapter of a set: .* Install peft>=0.21"):
        check_saved_whole(config)
