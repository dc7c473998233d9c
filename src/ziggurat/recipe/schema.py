"""The schema of recipes: every key with its type, default and meaning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .tasks import TASKS, Task

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0.0, le=10.0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Every = Literal["epoch", "never"] | Positive

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


def _named(what: str) -> Any:
    return Field(default=None, description=f"column with {what}")


class ColumnsPart(Part):
    """Names of the columns of instruction, preference and tagged data, if they aren't the usual ones."""

    messages: str | None = _named("the conversation (else messages, conversations or conversation)")
    role: str | None = Field(default=None, description="key of a message with its role (else role or from)")
    content: str | None = Field(default=None, description="key of a message with its text (else content or value)")
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

    system: list[str] | None = Field(default=None, description="of the system prompt (beside system, developer)")
    user: list[str] | None = Field(default=None, description="of the user (beside user, human, prompter)")
    assistant: list[str] | None = Field(
        default=None, description="of the assistant (beside assistant, gpt, model, bot, ...)"
    )
    tool: list[str] | None = Field(
        default=None, description="of a tool's results (beside tool, observation, function, ...)"
    )
    call: list[str] | None = Field(
        default=None, description="of a message that is a call of a tool in JSON (beside function_call, tool_call)"
    )


class DataPart(Part):
    """The sources of the examples, and the meaning of their columns."""

    train: str = Field(
        description="csv, tsv, json, jsonl, txt (or .gz), parquet or xlsx file, hub data set, `glue/<task>`, or `demo`"
    )
    more: list[str] | None = Field(
        default=None, description="further files to learn from; a list in data.train is split into both keys"
    )
    weights: list[Annotated[float, Field(gt=0.0)]] | None = Field(
        default=None,
        description="how often the rows of each of several files are learned from: 2 twice, 0.5 half of them; else 1",
    )
    folder: str | None = Field(
        default=None, description="for `glue/<task>`: folder with <task>/train.parquet and so on, instead of the hub"
    )
    validation: str | None = Field(
        default=None, description="the same for the scores; without it a part of `train` is split off with the seed"
    )
    subset: str | None = Field(default=None, description="configuration of a hub data set, e.g. mrpc of nyu-mll/glue")
    train_split: str = Field(default="train", description="split of a hub data set to learn from")
    validation_split: str | None = Field(default=None, description="split of a hub data set for the scores")
    validation_share: Share = Field(default=0.1, description="share split off where no validation data are named")
    validation_rows: Positive | None = Field(default=None, description="rows split off, instead of a share")
    max_train: Positive | None = Field(default=None, description="learn from so many rows at most, drawn with the seed")
    max_validation: Positive | None = Field(
        default=None, description="score on so many rows at most, drawn with the seed"
    )
    text: str = Field(default="text", description="column with the text (or the first of two)")
    text_pair: str | None = Field(default=None, description="column with the second text")
    label: str = Field(default="label", description="column with the class or the number to predict")
    label_names: list[str] | None = Field(default=None, description="names of the classes 0, 1, ...")
    label_separator: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="multilabel: the text between the labels of a row, e.g. `;`; lists need none"
    )
    format: Literal["auto", "prompt", "alpaca", "messages", "text"] = Field(
        default="auto",
        description="instruct: prompt + completion, instruction (+ input) + output, conversations, or plain text",
    )
    as_chat: bool = Field(
        default=False,
        description="instruct: prompt and answer become messages of user and assistant, joined by the chat template",
    )
    loss: Literal["answer", "last", "all"] = Field(
        default="answer", description="instruct: learn all answers of a conversation, the last one, or the whole text"
    )
    packing: bool = Field(
        default=False, description="plain text: rows are joined and cut into pieces of max_length, so nothing is lost"
    )
    streaming: bool = Field(
        default=False, description="instruct: read rows as they are learned from, for train.max_steps steps"
    )
    shuffle_buffer: Positive = Field(default=1000, description="rows of a stream that are shuffled at a time")
    max_length: Positive | None = Field(
        default=None,
        description=f"tokens; longer rows are cut, and counted. Without it {SCORED_LENGTH}, for instruct as many as "
        f"95% of the training rows have, at most {MOST_LENGTH}",
    )
    image_folder: str | None = Field(
        default=None, description="folder that paths of images start from; without it that of the file which names them"
    )
    max_target: Positive | None = Field(
        default=None,
        description="seq2seq: tokens of a target; longer ones are cut, and counted, and no more are written when "
        f"scoring. Without it as many as 95% of the training rows have, at most {MOST_LENGTH}",
    )
    prefix: str = Field(
        default="", description="seq2seq: stands before every source, here and when asked, e.g. `summarize: ` for T5"
    )
    encoding: str | None = Field(
        default=None, description="of text files, e.g. cp1252; without it UTF-8, or UTF-16 where a mark says so"
    )
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = Field(
        default=None, description="character between the columns of a csv file; without it the one of its first line"
    )
    drop_missing: bool = Field(
        default=False, description="leave out rows that lack a text or a label, and count them, instead of an error"
    )
    similar_labels: Literal["merge", "keep"] | None = Field(
        default=None, description="labels that differ by case or blanks alone: one class, or a class each"
    )
    columns: ColumnsPart = ColumnsPart()
    roles: RolesPart = RolesPart()


class HeadPart(Part):
    """The classification or regression head."""

    pooling: Literal["model", "mean"] = Field(
        default="model", description="the model's own head, or a linear head on the mean of the last states"
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.1, description="dropout before the mean-pooled head"
    )
    lr: Rate | None = Field(default=None, description="learning rate of the head; without it train.lr")


class RewardsPart(Part):
    """The rewards of grpo and rloo. A recipe names functions and never contains code."""

    functions: list[str] | None = Field(
        default=None,
        description="rewards that are added up: exact, last_number, regex, json, length, or names of functions of your "
        "own, which come by `--reward FILE:NAME` or an installed package's entry point",
    )
    weights: list[float] | None = Field(default=None, description="each one's weight in the sum; without it 1")
    answer: str = Field(default="answer", description="exact and last_number: column with the right answer")
    pattern: str | None = Field(default=None, description="regex: the regular expression to be found in a completion")
    most: Positive | None = Field(default=None, description="length: the most characters of a completion")
    beta: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="how strongly the model is held near the one that it starts from; 0: not at all"
    )


class SamplingPart(Part):
    """The sampling of completions in grpo, rloo and distill."""

    completions: Annotated[int, Field(ge=2)] = Field(default=8, description="completions of a prompt: its group")
    tokens: Positive = Field(default=256, description="the most tokens of a completion")
    temperature: Annotated[float, Field(gt=0.0, le=10.0)] = Field(
        default=1.0, description="logits are divided by it before a token is drawn"
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0, description="tokens are drawn from the likeliest that have this probability together"
    )
    vllm: Literal["colocate", "server"] | None = Field(
        default=None, description="vLLM draws, on the training GPUs or in a server of `trl vllm-serve`; else the model"
    )
    vllm_options: dict[str, bool | int | float | str] | None = Field(
        default=None,
        description="TRL's settings of vLLM by their names without `vllm_`, such as server_base_url, "
        "gpu_memory_utilization, tensor_parallel_size",
    )


class TeacherPart(Part):
    """The teacher of distill."""

    model: str | None = Field(
        default=None,
        description="folder or hub name of the model to learn from, which has the student's tokens",
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        default="float32", description="dtype of the teacher's weights"
    )
    beta: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=1.0,
        description="1: the reverse KL divergence, of the student from the teacher; 0: the forward one; between them "
        "the generalised Jensen-Shannon divergence",
    )


class TrainPart(Part):
    """The training loop."""

    epochs: Annotated[float, Field(gt=0.0)] = Field(default=3.0, description="passes over the training data")
    max_steps: Positive | None = Field(
        default=None, description="stop after so many optimiser steps, whatever the epochs"
    )
    batch: Positive = Field(
        default=16, description="examples (of tasks with prompts: completions) a device takes at once"
    )
    eval_batch: Positive = Field(default=32, description="the same when scoring")
    accumulate: Positive = Field(default=1, description="batches added up for one optimiser step")
    lr: Rate = Field(default=1.0e-3, description="peak learning rate (AdamW)")
    beta: Annotated[float, Field(gt=0.0)] = Field(
        default=0.1,
        description="dpo, kto: how strongly the model is held near its start; orpo: the odds ratio's weight",
    )
    optimizer: str | None = Field(
        default=None, description="by transformers' name, such as adamw_8bit, adafactor, lion_32bit; without it AdamW"
    )
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(default=0.0, description="AdamW's decoupled weight decay")
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(ge=0.0)]] | None = Field(
        default=None,
        description="classification: weight of an example of each class in the loss, else 1; balanced: all classes "
        "alike in sum",
    )
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        default="linear", description="course of the learning rate after the warm-up"
    )
    warmup: Annotated[float, Field(ge=0.0)] = Field(
        default=0.06, description="below 1: share of all steps; from 1 on: number of steps"
    )
    max_grad_norm: Annotated[float, Field(ge=0.0)] = Field(
        default=1.0, description="gradients are clipped to this norm; 0: never"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="autocast of the forward pass")
    gradient_checkpointing: bool = Field(default=False, description="recompute activations: less memory, more time")
    group_by_length: bool = Field(default=False, description="batches of similar length: less padding")
    evaluate: Every = Field(
        default="epoch", description="score after each epoch, every N steps, or never (only at the end)"
    )
    evaluate_before: bool = Field(default=True, description="score the validation data before the first step, too")
    save: Every = Field(
        default="epoch", description="checkpoint after each epoch, every N steps, or never (only on Ctrl-C)"
    )
    keep: Positive = Field(default=2, description="newest checkpoints kept while training")
    best: bool = Field(default=False, description="end with the checkpoint of the best score instead of the last")
    patience: Positive | None = Field(
        default=None, description="stop after so many scorings without a better score; needs train.best"
    )
    answers: Annotated[int, Field(ge=0)] = Field(
        default=3,
        description="instruct, seq2seq: so many validation rows are answered before and after, to be read",
    )
    workers: Annotated[int, Field(ge=0)] = Field(default=0, description="processes that prepare batches")
    report_to: list[str] | None = Field(
        default=None, description="trackers that get every logged number: tensorboard, wandb, trackio, ..."
    )


class Recipe(Part):
    """One complete run. `recipe.load_recipe` reads and checks it; build it in Python by `recipe.make_recipe`."""

    about: str = Field(default="", description="one line about this recipe")
    name: str = Field(default="run", description="names the output folder; without it the file's name")
    task: TaskName = Field(default="classification", description="the task to learn")
    model: str = Field(description="folder or hub name, or `embedded` (all-MiniLM-L6-v2 from the installed package)")
    gguf_file: str | None = Field(
        default=None, description="file in `model` when the weights are in llama.cpp's format"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        default="float32", description="dtype of the frozen base weights"
    )
    attn_implementation: str | None = Field(
        default=None,
        description="of transformers: sdpa, eager, flash_attention_2, flex_attention; else its choice",
    )
    adapter: str | None = Field(
        default=None, description="folder of an adapter to go on from, of the same method and model; else a fresh one"
    )
    tower: Literal["language", "vision", "both"] = Field(
        default="language", description="which part of a model that sees images is adapted"
    )
    metric: Metric | None = Field(
        default=None, description="the score of the table; without it the usual one of the task"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=42, description="seeds the split, the fresh weights and the order"
    )
    output: str | None = Field(default=None, description="folder of the adapter; without it ziggurat-runs/<name>")
    spectra: Every = Field(
        default="never", description="record the adapter's singular values after each epoch, every N steps, or never"
    )
    resume: bool = Field(default=False, description="go on from the last checkpoint of an interrupted run")
    overwrite: bool = Field(default=False, description="replace the files of an earlier run in the output folder")
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
