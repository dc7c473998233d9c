"""ms-swift (4.6): `--tuner_type msplora`, or another method's name. It takes this file's path:

    swift sft --external_plugins $(ziggurat plugin-path swift) --tuner_type msplora --lora_rank 8 \\
        --model_kwargs '{"ziggurat": {"even_scales": true}}' ...

ms-swift's own arguments for LoRA (rank, alpha, dropout, targets, bias, modules_to_save) hold for the method too; the
values under `ziggurat` are fields of the method's config and override them.
"""

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map  # pyright: ignore[reportMissingImports]

import ziggurat  # noqa: F401  registers the methods
from ziggurat.errors import ConfigError
from ziggurat.host.method import METHODS
from ziggurat.integrations.with_method import of_method

#: ms-swift's task -> PEFT's task type; None: it has none.
_TASKS = {"EMBEDDING": None, "RERANKER": "SEQ_CLS", "GENERATIVE_RERANKER": "CAUSAL_LM", "DECISION": "CAUSAL_LM"}


class _MethodTuner(PeftTuner):
    """Makes an adapter of one method; PEFT saves and loads it."""

    method: str

    @classmethod
    def prepare_model(cls, args: Any, model: Any) -> PeftModel:
        """`model` with a fresh adapter.

        Raises:
            ConfigError: arguments of ms-swift that the method doesn't support.
        """
        from swift.pipelines.train.tuner import (  # pyright: ignore[reportMissingImports]
            get_modules_to_save,
            get_target_modules,
        )

        task = args.task_type.upper()
        lora = LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            bias=args.lora_bias,
            target_modules=get_target_modules(args, model),
            modules_to_save=get_modules_to_save(args, model, args.task_type) or None,
            target_parameters=args.target_parameters,
            use_rslora=args.use_rslora,
            use_dora=args.use_dora,
            init_lora_weights=args.init_weights,
            task_type=_TASKS.get(task, task),
        )
        refused = {name: getattr(args, name, None) for name in ("lorap_lr_ratio", "lora_dtype", "use_swift_lora")}
        if unsupported := [f"{name}={value}" for name, value in refused.items() if value]:
            raise ConfigError(f"--tuner_type {cls.method} can't follow {', '.join(unsupported)}: leave that out.")
        fields = (args.model_kwargs or {}).get("ziggurat") or {}
        return get_peft_model(model, of_method(lora, cls.method, fields))  # pyright: ignore[reportReturnType]


tuners_map.update({name.lower(): type(name, (_MethodTuner,), {"method": name.lower()}) for name in METHODS})
