"""Warns if all completions of a group have equal rewards, or none, so that nothing is learned."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

#: Consecutive logged steps without signal before the warning.
MANY = 10
#: Below this temperature the completions of a group are mostly the same.
COLD = 0.5


class NoSignal(TrainerCallback):
    """Warns once if every group's rewards have been equal, or missing, for `MANY` steps, with the likely causes.

    It reads the log of TRL's trainers.

    Args:
        tell: receives the warning.
        temperature: the temperature of the completions.
        tokens: the maximum number of tokens of a completion.
    """

    def __init__(self, tell: Callable[[str], None], temperature: float, tokens: int) -> None:
        self._tell, self._temperature, self._tokens = tell, temperature, tokens
        self._silent: list[dict[str, float]] = []
        self._warned = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "frac_reward_zero_std" not in logs or self._warned:
            return
        # RLOO includes the distance from the start in the rewards of a group, but not in those of a step.
        silent = logs["frac_reward_zero_std"] == 1 or logs.get("reward_std") == 0 or without_reward(logs)
        self._silent = [*self._silent, logs] if silent else []
        if len(self._silent) < MANY:
            return
        self._warned = True
        at = f"step {state.global_step} of {state.max_steps}: in each of the last {MANY} steps"
        if all(map(without_reward, self._silent)):
            self._tell(
                f"{at} every reward function returned None for every completion, so nothing is learned. Return a "
                "number for the completions that it can judge."
            )
            return
        self._tell(
            f"{at} all completions of a prompt had the same reward ({self._mean('reward'):.2f} on average), so "
            f"nothing is learned. Likely causes: {'; '.join(self._causes())}."
        )

    def _mean(self, name: str) -> float:
        values = [value for logs in self._silent if (value := logs.get(name)) is not None and not math.isnan(value)]
        return sum(values) / len(values) if values else 0.0

    def _causes(self) -> list[str]:
        """The likeliest first."""
        cut = self._mean("completions/clipped_ratio")
        causes = []
        if cut > 0.5:
            causes.append(f"{cut:.0%} of the completions are cut at sampling.tokens {self._tokens}: raise it")
        if self._temperature < COLD:
            causes.append(f"sampling.temperature {self._temperature:g} draws one completion again and again: raise it")
        return [
            *causes,
            "the prompts are too hard for this model, or solved already: take others, or a model that has learned the "
            "form of an answer",
            "the reward function gives every completion the same: the completions in the run's logs show whether it "
            "should",
        ]


def without_reward(logs: Mapping[str, Any]) -> bool:
    """Whether no completion of a logged step of TRL's trainers had a reward: then it is None, in older ones NaN."""
    reward = logs.get("reward", 0.0)
    return reward is None or math.isnan(reward)
