"""sentence-transformers and SetFit: train an adapter, save it, load it again with nothing but their own calls."""

from contextlib import closing
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from training_tables import save_tiny_bert

import ziggurat_door
from fresh import Fresh
from installed import PROJECT, install
from ziggurat import MSPLoraConfig

sentences = pytest.importorskip("sentence_transformers")
losses = pytest.importorskip("sentence_transformers.losses")

TEXTS = ["the film is very good", "the plot is dull", "a lovely scene", "the music is awful"]


def encoder(folder: Path) -> "sentences.SentenceTransformer":
    """A mean-pooled BERT with an adapter that trains."""
    if not (folder / "bert").exists():
        save_tiny_bert(folder / "bert")
    model = sentences.SentenceTransformer(str(folder / "bert"), device="cpu")
    model.add_adapter(MSPLoraConfig(r=4, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"))
    return model


def test_sentence_transformers(tmp_path: Path) -> None:
    model = encoder(tmp_path)
    before = torch.tensor(model.encode(TEXTS))
    pairs = Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]})
    args = sentences.SentenceTransformerTrainingArguments(
        str(tmp_path / "runs"), max_steps=3, learning_rate=0.05, report_to="none", save_strategy="no", use_cpu=True
    )
    loss = losses.MultipleNegativesRankingLoss(model)
    sentences.SentenceTransformerTrainer(model, args, train_dataset=pairs, loss=loss).train()
    after = torch.tensor(model.encode(TEXTS))
    assert not torch.allclose(before, after, atol=1e-3)
    model.save_pretrained(str(tmp_path / "saved"))
    torch.save(after, tmp_path / "after.pt")
    check_loading(tmp_path, "from sentence_transformers import SentenceTransformer\n")


def check_loading(folder: Path, program: str) -> None:
    """In a process that has imported nothing of ours, by what the card says."""
    install(folder / "site", PROJECT["name"], PROJECT["entry-points"])
    path = [str(folder / "site"), str(Path(ziggurat_door.__file__).parent)]
    with closing(Fresh(folder, "peft, sentence_transformers", PYTHONPATH=":".join(path))) as fresh:
        done = fresh.run(
            f"import torch\n{program}model = SentenceTransformer('saved', device='cpu')\n"
            f"assert torch.equal(torch.tensor(model.encode({TEXTS!r})), torch.load('after.pt'))",
            folder=folder,
        )
    assert done.returncode == 0, done.stderr


def test_setfit(tmp_path: Path) -> None:
    setfit = pytest.importorskip("setfit")
    model = setfit.SetFitModel(model_body=encoder(tmp_path), model_head=setfit.modeling.LogisticRegression())
    data = Dataset.from_dict({"text": TEXTS, "label": [1, 0, 1, 0]})
    args = setfit.TrainingArguments(str(tmp_path / "runs"), max_steps=2, batch_size=2, report_to="none")
    setfit.Trainer(model, args, train_dataset=data).train()
    model.save_pretrained(str(tmp_path / "saved"))
    # With it transformers takes the folder for a whole model, and looks for weights that no adapter of PEFT has.
    (tmp_path / "saved" / "config.json").unlink()
    again = setfit.SetFitModel.from_pretrained(str(tmp_path / "saved"))
    assert torch.equal(torch.tensor(again.model_body.encode(TEXTS)), torch.tensor(model.model_body.encode(TEXTS)))
    assert again.predict(TEXTS).tolist() == model.predict(TEXTS).tolist()
