"""The schema of recipes: every key with its type, default and meaning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .tasks import TASKS, Task

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Rate = Annotated[float, Field(gt=0.0, le=10.0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Every = Literal["epoch", "never"] | Positive
Dtype = Literal["float32", "bfloat16", "float16", "auto"]

#: Default lengths in tokens: of a scored text, and the maximum of an instruction's row.
SCORED_LENGTH, MOST_LENGTH = 256, 2048

if TYPE_CHECKING:
    Metric = TaskName = str
else:  # all names in the table of tasks
    Metric = Literal[tuple(dict.fromkeys(metric for task in TASKS.values() for metric in task.metrics))]
    TaskName = Literal[tuple(TASKS)]


class Part(BaseModel):
    """One section of a recipe: unknown keys are refused, values aren't converted, and the object is immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def entry(default: Any, meaning: str) -> Any:
    """A key with its default."""
    return Field(default=default, description=meaning)


def _named(content: str) -> Any:
    return entry(None, f"column with {content}")


class ColumnsPart(Part):
    """Names of the columns of instruction, preference and tagged data, if they aren't the usual ones."""

    messages: str | None = _named("the conversation (else messages, conversations or conversation)")
    role: str | None = entry(None, "key of a message with its role (else role or from)")
    content: str | None = entry(None, "key of a message with its text (else content or value)")
    tools: str | None = _named("the tools that a conversation may call (else tools)")
    system: str | None = _named("the system prompt (else system)")
    history: str | None = _named("earlier turns, as pairs of question and answer (else history)")
    prompt: str | None = _named("the prompt (else prompt, question or query)")
    completion: str | None = _named("the answer to it (else completion, answer or response)")
    instruction: str | None = _named("Alpaca's instruction (else instruction)")
    input: str | None = _named("Alpaca's input (else input or context)")
    output: str | None = _named("Alpaca's answer (else output or response)")
    text: str | None = _named("plain text (else text)")
    tokens: str | None = _named("the words of a text (else tokens)")
    tags: str | None = _named("the BIO tags of these words (else tags)")
    images: str | None = _named("the images of a conversation (else images or image)")
    source: str | None = _named("the text to be rewritten (else source, document, article, dialogue, text or input)")
    target: str | None = _named("the output text (else target, summary, highlights or output)")
    chosen: str | None = _named("the better of two answers (else chosen)")
    rejected: str | None = _named("the worse of two answers (else rejected)")


class RolesPart(Part):
    """Further names of the roles in conversations, beside the usual ones."""

    system: list[str] | None = entry(None, "of the system prompt (beside system, developer)")
    user: list[str] | None = entry(None, "of the user (beside user, human, prompter)")
    assistant: list[str] | None = entry(None, "of the assistant (beside assistant, gpt, model, bot, ...)")
    tool: list[str] | None = entry(None, "of a tool's results (beside tool, observation, function, ...)")
    call: list[str] | None = entry(
        None, "of a message that is a call of a tool in JSON (beside function_call, tool_call)"
    )


class DataPart(Part):
    """The sources of the examples, and the meaning of their columns."""

    train: str = Field(
        description="csv, tsv, json, jsonl, txt (or .gz), parquet or xlsx file, hub data set, `glue/<task>`, or `demo`"
    )
    more: list[str] | None = entry(None, "further files to learn from; a list in data.train is split into both keys")
    weights: list[AboveZero] | None = entry(
        None, "how often the rows of each of several files are learned from: 2 twice, 0.5 half of them; else 1"
    )
    folder: str | None = entry(
        None, "for `glue/<task>`: folder with <task>/train.parquet and so on, instead of the hub"
    )
    validation: str | None = entry(
        None, "the same for the scores; without it a part of `train` is split off with the seed"
    )
    subset: str | None = entry(None, "configuration of a hub data set, e.g. mrpc of nyu-mll/glue")
    train_split: str = entry("train", "split of a hub data set to learn from")
    validation_split: str | None = entry(None, "split of a hub data set for the scores")
    validation_share: Share = entry(0.1, "share split off where no validation data are named")
    validation_rows: Positive | None = entry(None, "rows split off, instead of a share")
    max_train: Positive | None = entry(None, "learn from so many rows at most, drawn with the seed")
    max_validation: Positive | None = entry(None, "score on so many rows at most, drawn with the seed")
    text: str = entry("text", "column with the text (or the first of two)")
    text_pair: str | None = entry(None, "column with the second text")
    label: str = entry("label", "column with the class or the number to predict")
    label_names: list[str] | None = entry(None, "names of the classes 0, 1, ...")
    label_separator: Annotated[str, Field(min_length=1)] | None = entry(
        None, "multilabel: the text between the labels of a row, e.g. `;`; lists need none"
    )
    format: Literal["auto", "prompt", "alpaca", "messages", "text"] = entry(
        "auto", "instruct: prompt + completion, instruction (+ input) + output, conversations, or plain text"
    )
    as_chat: bool = entry(
        False, "instruct: prompt and answer become messages of user and assistant, joined by the chat template"
    )
    loss: Literal["answer", "last", "all"] = entry(
        "answer", "instruct: learn all answers of a conversation, the last one, or the whole text"
    )
    packing: bool = entry(False, "plain text: rows are joined and cut into pieces of max_length, so nothing is lost")
    streaming: bool = entry(False, "instruct: read rows as they are learned from, for train.max_steps steps")
    shuffle_buffer: Positive = entry(1000, "rows of a stream that are shuffled at a time")
    max_length: Positive | None = entry(
        None,
        f"tokens; longer rows are cut, and counted. Without it {SCORED_LENGTH}, for instruct as many as "
        f"95% of the training rows have, at most {MOST_LENGTH}",
    )
    image_folder: str | None = entry(
        None, "folder that paths of images start from; without it that of the file which names them"
    )
    max_target: Positive | None = entry(
        None,
        "seq2seq: tokens of a target; longer ones are cut, and counted, and no more are written when "
        f"scoring. Without it as many as 95% of the training rows have, at most {MOST_LENGTH}",
    )
    prefix: str = entry("", "seq2seq: stands before every source, here and when asked, e.g. `summarize: ` for T5")
    encoding: str | None = entry(None, "of text files, e.g. cp1252; without it UTF-8, or UTF-16 where a mark says so")
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = entry(
        None, "character between the columns of a csv file; without it the one of its first line"
    )
    drop_missing: bool = entry(False, "leave out rows that lack a text or a label, and count them, instead of an error")
    similar_labels: Literal["merge", "keep"] | None = entry(
        None, "labels that differ by case or blanks alone: one class, or a class each"
    )
    columns: ColumnsPart = ColumnsPart()
    roles: RolesPart = RolesPart()

    @property
    def sources(self) -> list[str]:
        """The sources of the training rows."""
        return [self.train, *(self.more or [])]

    @property
    def scored(self) -> str:
        """The source of the rows that are scored; if it is that of training, another split, or a part."""
        return self.validation or self.train


class HeadPart(Part):
    """The classification or regression head."""

    pooling: Literal["model", "mean"] = entry(
        "model", "the model's own head, or a linear head on the mean of the last states"
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = entry(0.1, "dropout before the mean-pooled head")
    lr: Rate | None = entry(None, "learning rate of the head; without it train.lr")


class RewardsPart(Part):
    """The rewards of grpo and rloo. A recipe names functions and never contains code."""

    functions: list[str] | None = entry(
        None,
        "rewards that are added up: exact, last_number, regex, json, length, or names of functions of your "
        "own, which come by `--reward FILE:NAME` or an installed package's entry point",
    )
    weights: list[float] | None = entry(None, "each one's weight in the sum; without it 1")
    answer: str = entry("answer", "exact and last_number: column with the right answer")
    pattern: str | None = entry(None, "regex: the regular expression to be found in a completion")
    most: Positive | None = entry(None, "length: the most characters of a completion")
    beta: NotNegative = entry(0.0, "how strongly the model is held near the one that it starts from; 0: not at all")


class SamplingPart(Part):
    """The sampling of completions in grpo, rloo and distill."""

    completions: Annotated[int, Field(ge=2)] = entry(8, "completions of a prompt: its group")
    tokens: Positive = entry(256, "the most tokens of a completion")
    temperature: Annotated[float, Field(gt=0.0, le=10.0)] = entry(
        1.0, "logits are divided by it before a token is drawn"
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = entry(
        1.0, "tokens are drawn from the likeliest that have this probability together"
    )
    vllm: Literal["colocate", "server"] | None = entry(
        None, "vLLM draws, on the training GPUs or in a server of `trl vllm-serve`; else the model"
    )
    vllm_options: dict[str, bool | int | float | str] | None = entry(
        None,
        "TRL's settings of vLLM by their names without `vllm_`, such as server_base_url, "
        "gpu_memory_utilization, tensor_parallel_size",
    )


class TeacherPart(Part):
    """The teacher of distill."""

    model: str | None = entry(None, "folder or hub name of the model to learn from, which has the student's tokens")
    revision: str | None = entry(None, "branch, tag or commit of a hub model")
    dtype: Dtype = entry("float32", "dtype of the teacher's weights")
    beta: Annotated[float, Field(ge=0.0, le=1.0)] = entry(
        1.0,
        "1: the reverse KL divergence, of the student from the teacher; 0: the forward one; between them "
        "the generalised Jensen-Shannon divergence",
    )


class TrainPart(Part):
    """The training loop."""

    epochs: AboveZero = entry(3.0, "passes over the training data")
    max_steps: Positive | None = entry(None, "stop after so many optimiser steps, whatever the epochs")
    batch: Positive = entry(16, "examples (of tasks with prompts: completions) a device takes at once")
    eval_batch: Positive = entry(32, "the same when scoring")
    accumulate: Positive = entry(1, "batches added up for one optimiser step")
    lr: Rate = entry(1.0e-3, "peak learning rate (AdamW)")
    beta: AboveZero = entry(
        0.1, "dpo, kto: how strongly the model is held near its start; orpo: the odds ratio's weight"
    )
    optimizer: str | None = entry(
        None, "by transformers' name, such as adamw_8bit, adafactor, lion_32bit; without it AdamW"
    )
    weight_decay: NotNegative = entry(0.0, "AdamW's decoupled weight decay")
    class_weights: Literal["balanced"] | dict[str, NotNegative] | None = entry(
        None,
        "classification: weight of an example of each class in the loss, else 1; balanced: all classes alike in sum",
    )
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = entry(
        "linear", "course of the learning rate after the warm-up"
    )
    warmup: NotNegative = entry(0.06, "below 1: share of all steps; from 1 on: number of steps")
    max_grad_norm: NotNegative = entry(1.0, "gradients are clipped to this norm; 0: never")
    precision: Literal["fp32", "bf16", "fp16"] = entry("fp32", "autocast of the forward pass")
    gradient_checkpointing: bool = entry(False, "recompute activations: less memory, more time")
    group_by_length: bool = entry(False, "batches of similar length: less padding")
    evaluate: Every = entry("epoch", "score after each epoch, every N steps, or never (only at the end)")
    evaluate_before: bool = entry(True, "score the validation data before the first step, too")
    save: Every = entry("epoch", "checkpoint after each epoch, every N steps, or never (only on Ctrl-C)")
    keep: Positive = entry(2, "newest checkpoints kept while training")
    best: bool = entry(False, "end with the checkpoint of the best score instead of the last")
    patience: Positive | None = entry(None, "stop after so many scorings without a better score; needs train.best")
    answers: Count = entry(3, "instruct, seq2seq: so many validation rows are answered before and after, to be read")
    workers: Count = entry(0, "processes that prepare batches")
    report_to: list[str] | None = entry(None, "trackers that get every logged number: tensorboard, wandb, trackio, ...")


class Recipe(Part):
    """One complete run. `recipe.load_recipe` reads and checks it; build it in Python by `recipe.make_recipe`."""

    about: str = entry("", "one line about this recipe")
    name: str = entry("run", "names the output folder; without it the file's name")
    task: TaskName = entry("classification", "the task to learn")
    model: str = Field(description="folder or hub name, or `embedded` (all-MiniLM-L6-v2 from the installed package)")
    gguf_file: str | None = entry(None, "file in `model` when the weights are in llama.cpp's format")
    revision: str | None = entry(None, "branch, tag or commit of a hub model")
    dtype: Dtype = entry("float32", "dtype of the frozen base weights")
    attn_implementation: str | None = entry(
        None, "of transformers: sdpa, eager, flash_attention_2, flex_attention; else its choice"
    )
    adapter: str | None = entry(
        None, "folder of an adapter to go on from, of the same method and model; else a fresh one"
    )
    tower: Literal["language", "vision", "both"] = entry(
        "language", "which part of a model that sees images is adapted"
    )
    metric: Metric | None = entry(None, "the score of the table; without it the usual one of the task")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = entry(42, "seeds the split, the fresh weights and the order")
    output: str | None = entry(None, "folder of the adapter; without it ziggurat-runs/<name>")
    spectra: Every = entry("never", "record the adapter's singular values after each epoch, every N steps, or never")
    resume: bool = entry(False, "go on from the last checkpoint of an interrupted run")
    overwrite: bool = entry(False, "replace the files of an earlier run in the output folder")
    data: DataPart
    head: HeadPart = HeadPart()
    rewards: RewardsPart = RewardsPart()
    sampling: SamplingPart = SamplingPart()
    teacher: TeacherPart = TeacherPart()
    train: TrainPart = TrainPart()
    method: dict[str, Any] = Field(description="method.name and the fields of its PEFT config")

    @property
    def folder(self) -> str:
        return self.output if self.output is not None else f"ziggurat-runs/{self.name}"

    @property
    def main_metric(self) -> str:
        return self.metric if self.metric is not None else self.kind.metrics[0]

    @property
    def kind(self) -> Task:
        """The task's row in the table."""
        return TASKS[self.task]

    @property
    def writes(self) -> bool:
        """Whether the task's model writes texts; else it scores them."""
        return self.kind.writes


def keys() -> dict[str, Any]:
    """Every dotted key but the method's own fields, with pydantic's description of it."""
    return {key: info for key, info in _keys_of(Recipe, "") if key != "method"}


def _keys_of(part: type[Part], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, info in part.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, Part):
            yield from _keys_of(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info
