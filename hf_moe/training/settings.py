"""The keys of a training recipe that are neither the data's nor Trainer's."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(kw_only=True)
class ModelSettings:
    """What is trained.

    Args:
        model_name_or_path: a checkpoint, dense or a mixture: a folder or a Hub id.
        revision: branch, tag or commit of a Hub checkpoint.
        tokenizer_name: where the tokenizer is, if not there.
        trust_remote_code: whether code of the checkpoint may run. Mixtures of ours need none here.
        dtype: of the weights while they train; "auto": as they are stored.
        from_scratch: whether weights are drawn anew, by the configuration alone.
        ignore_mismatched_sizes: whether a head for other labels is made anew; else the checkpoint's labels are kept.
        attn_implementation, experts_implementation: as in `from_pretrained`.
        distributed: sizes of Transformers' `DistributedConfig` (`fsdp_size`, `ep_size`, `tp_size`), by which the model
            is shared out over processes while it loads.
        upcycle: keys of `UpcycleRecipe`, if a dense checkpoint is to become a mixture first.
        dropout: of everything that has one (embeddings, residuals, attention, activations, head), in place of the
            configuration's.
        router_aux_loss_coef, router_z_loss_coef, router_entropy_coef, router_jitter_noise, router_bias_update_rate,
            router_aux_loss_scope: in place of the configuration's.
        config_overrides: other fields of the configuration.
    """

    model_name_or_path: str
    revision: str | None = None
    tokenizer_name: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "float32"
    from_scratch: bool = False
    ignore_mismatched_sizes: bool = False
    attn_implementation: str | None = None
    experts_implementation: str | None = None
    distributed: dict[str, Any] | None = None
    upcycle: dict[str, Any] | None = None
    dropout: float | int | None = None
    router_aux_loss_coef: float | int | None = None
    router_z_loss_coef: float | int | None = None
    router_entropy_coef: float | int | None = None
    router_jitter_noise: float | int | None = None
    router_bias_update_rate: float | int | None = None
    router_aux_loss_scope: Literal["micro_batch", "global_batch"] | None = None
    config_overrides: dict[str, Any] | None = None


@dataclass(kw_only=True)
class MethodSettings:
    """How it is trained, beside what `TrainingArguments` say.

    Args:
        freeze: a preset of `freezing.PRESETS`, "gradual:N", or patterns of the parameters that stay as they are.
        peft: a preset of adapters, or a mapping with `preset` and its options.
        router_learning_rate: the routers' own; by default `learning_rate`.
        early_stopping_patience: evaluations without a better `metric_for_best_model` before training stops.
        early_stopping_threshold: by how much it must be better.
        contrastive_scale: what cosines are multiplied by in the loss of sentence embeddings.
        resume_from_checkpoint: a checkpoint to go on from; true: the last one of the same output; "auto": that, if
            there is one.
    """

    freeze: str | list[str] = "none"
    peft: str | dict[str, Any] | None = None
    router_learning_rate: float | int | None = None
    early_stopping_patience: int | None = None
    early_stopping_threshold: float | int = 0.0
    contrastive_scale: float | int = 20.0
    resume_from_checkpoint: bool | str | None = None
