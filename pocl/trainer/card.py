"""What a model card says of how the student was made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pocl.models.wrappers import peft_wrapper

_TEXT = """
## Distillation

Distilled from a larger model along a curriculum with [POCL](https://arxiv.org/abs/2506.05695): easy samples first,
harder ones added stage by stage, while the temperature of the softmaxes rises.

- loss: {divergence}, temperature and weights by stage as below{squared}
- batches of {batch_size} samples{on_policy}{adapters}

```
{table}
```

{results}"""


def distillation_section(trainer: Any) -> str:
    """Markdown: loss, stages, and the last figures of each stage, of a POCLTrainer."""
    args = trainer.args
    last: dict[int, dict[str, Any]] = {}
    for line in trainer.progress.read_log():
        if "stage" in line:
            last.setdefault(line["stage"], {}).update(line)
    names = ["loss", "divergence", "cross_entropy", "eval_divergence", "eval_cross_entropy", "eval_rouge_l"]
    names = [name for name in names if any(name in line for line in last.values())]
    rows = [["stage", "step", *names]]
    rows += [
        [str(stage), str(line["step"]), *(f"{line[name]:.4g}" if name in line else "" for name in names)]
        for stage, line in sorted(last.items())
    ]
    rows.insert(1, ["---"] * len(rows[0]))
    # without evaluations there is no best checkpoint, and stages start from the last weights
    curriculum = trainer.curriculum if args.load_best_model_at_end else replace(trainer.curriculum, start="last")
    return _TEXT.format(
        divergence=", ".join(dict.fromkeys(map(repr, trainer.divergences))),
        squared=", multiplied by the squared temperature" if args.scale_by_temperature else "",
        batch_size=trainer.batch_size,
        on_policy=f", {args.on_policy:.0%} of them with responses of the student's own" if args.on_policy else "",
        adapters=_adapters(trainer.model),
        table=curriculum.describe(trainer.subsets, trainer.batch_size, args.learning_rate),
        results="\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n",
    )


def _adapters(model: Any) -> str:
    """What was trained in place of the weights."""
    config = (getattr(peft_wrapper(model), "peft_config", None) or {}).get("default")
    if config is None:
        return ""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kind = "DoRA" if getattr(config, "use_dora", False) else str(getattr(config.peft_type, "value", config.peft_type))
    kind = "LoRA" if kind == "LORA" else kind
    rank = f" of rank {config.r}" if getattr(config, "r", None) else ""
    scale = f", alpha {config.lora_alpha:g}" if getattr(config, "lora_alpha", None) else ""
    targets = sorted({name.rpartition(".")[2] for name in config.target_modules or ()})
    return f"\n- {kind} adapters{rank}{scale} on {', '.join(targets)}: {trained:,} numbers trained, all else frozen"
