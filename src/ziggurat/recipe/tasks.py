"""The table of tasks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One task.

    `model`: transformers' name of its models, after AutoModelFor. `rows`: the form of its data. `metrics`: the scores
    that a recipe may choose by, the default first. `package`: the package that trains or scores it, besides datasets.
    `names`: its names in other tools. `experimental`: TRL's trainer is experimental.
    """

    model: str
    rows: str
    metrics: tuple[str, ...]
    package: str
    names: tuple[str, ...] = ()
    experimental: bool = False

    @property
    def writes(self) -> bool:
        """Whether its model writes texts; else it scores them."""
        return self.model in ("CausalLM", "Seq2SeqLM")


#: TRL's names: the share of pairs whose better answer has the greater reward, and the rewards' distance.
_OF_PAIRS = ("rewards/accuracies", "rewards/margins")

TASKS = {
    "classification": Task(
        "SequenceClassification",
        "labelled",
        ("accuracy", "f1", "matthews"),
        "scikit-learn",
        ("text_classification", "sequence_classification", "seq_cls"),
    ),
    "multilabel": Task(
        "SequenceClassification",
        "labelled",
        ("f1_micro", "f1_macro", "subset_accuracy"),
        "datasets",
        ("multi_label_classification",),
    ),
    "tokens": Task(
        "TokenClassification",
        "tagged",
        ("entity_f1", "entity_precision", "entity_recall", "token_accuracy"),
        "datasets",
        ("ner", "token_classification", "token_cls"),
    ),
    "regression": Task("SequenceClassification", "labelled", ("pearson", "spearman"), "scipy"),
    "instruct": Task("CausalLM", "answers", ("perplexity",), "trl", ("sft", "pt", "causal_lm", "chat", "completion")),
    "seq2seq": Task(
        "Seq2SeqLM",
        "sources",
        ("rougeL", "rouge1", "rouge2", "exact_match", "perplexity"),
        "rouge-score",
        ("seq2seq_lm", "summarization", "translation", "text2text", "text2text_generation"),
    ),
    "dpo": Task("CausalLM", "pairs", _OF_PAIRS, "trl"),
    "orpo": Task("CausalLM", "pairs", _OF_PAIRS, "trl", experimental=True),
    "reward": Task("SequenceClassification", "pairs", _OF_PAIRS, "trl", ("rm", "reward_model", "reward_modeling")),
    "kto": Task("CausalLM", "judged", ("rewards/margins",), "trl"),
    "grpo": Task("CausalLM", "prompts", ("reward",), "trl"),
    "rloo": Task("CausalLM", "prompts", ("reward",), "trl"),
    "distill": Task("CausalLM", "prompts", ("divergence",), "trl", ("gkd", "distillation", "opd", "minillm")),
}
#: Tasks whose model gives a text one number.
NUMBERS = ("regression", "reward")
#: Tasks whose model writes texts.
WRITES = tuple(name for name, task in TASKS.items() if task.writes)
#: Tasks whose model learns from rewards of its own answers to prompts.
REWARDED = ("grpo", "rloo")


def task_called(name: object) -> str | None:
    """The task of this name, or of this name in another tool."""
    plain = str(name).strip().lower().replace("-", "_")
    return next((task for task, row in TASKS.items() if plain in (task, *row.names)), None)
