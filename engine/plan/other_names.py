"""Names that other projects give to fields of a plan, so that a message can lead from one to the field here."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

_FIELDS: Mapping[str, Sequence[str]] = {
    "optimizer.lr": ("base_lr", "init_lr", "learning_rate", "lr", "max_lr", "peak_lr"),
    "optimizer.weight_decay": ("wd", "weight_decay"),
    "optimizer.schedule": ("lr_schedule", "lr_scheduler", "lr_scheduler_type", "sched", "schedule", "scheduler"),
    "optimizer.warmup_steps": ("num_warmup_steps", "warmup", "warmup_iters", "warmup_iterations", "warmup_steps"),
    "optimizer.gradient_clipping": (
        *("clip_grad", "clip_grad_norm", "grad_clip", "gradient_clip_val", "gradient_clipping"),
        *("max_grad_norm", "max_norm"),
    ),
    "optimizer.layer_decay": ("layer_decay", "layerwise_decay", "llrd"),
    "optimizer.new_head_lr_scale": ("lr_mult_head",),
    "epochs": ("max_epochs", "n_epochs", "num_epochs", "num_train_epochs", "train_epochs"),
    "steps": ("iterations", "iters", "max_iters", "max_steps", "num_steps", "total_steps", "train_steps"),
    "batch.micro_batch_size_per_gpu": (
        *("batch_size", "micro_batch_size", "per_device_train_batch_size", "train_micro_batch_size_per_gpu"),
    ),
    "batch.gradient_accumulation_steps": (
        *("accum_freq", "accumulate_grad_batches", "accumulation", "accumulation_steps", "grad_accum"),
        *("gradient_accumulation", "gradient_accumulation_steps", "update_freq"),
    ),
    "batch.global_batch_size": ("global_batch_size", "total_batch_size", "train_batch_size"),
    "parallel.precision": ("amp", "bf16", "dtype", "fp16", "fp32", "mixed_precision", "precision", "torch_dtype"),
    "parallel.zero_stage": ("stage", "zero", "zero_optimization", "zero_stage"),
    "parallel.host": ("engine", "host", "strategy"),
    "launch.processes": ("devices", "gpus", "n_gpus", "nproc_per_node", "num_gpus", "num_processes", "world_size"),
    "loader.num_workers": ("dataloader_num_workers", "num_workers", "workers"),
    "checkpoint.every": ("save_every", "save_freq", "save_interval", "save_steps"),
    "checkpoint.keep_last": ("keep_last", "save_total_limit"),
    "checkpoint.keep_best": ("best_metric", "metric_for_best_model"),
    "checkpoint.best_is": ("greater_is_better",),
    "evaluate": ("eval", "evaluation", "evaluations"),
    "evaluate.every": ("eval_every", "eval_interval", "eval_steps", "val_check_interval"),
    "logging.every": ("log_every", "log_every_n_steps", "log_interval", "logging_steps"),
    "logging.tensorboard": ("tensorboard",),
    "init_from": ("from_stage", "resume_from"),
    "weights": ("checkpoint_path", "load_from", "pretrained", "pretrained_weights"),
    "data": ("dataset", "datasets", "train_data"),
    "data.source": ("path", "shards", "train_data", "url", "urls"),
    "objectives": ("loss", "losses"),
    "model.preset": ("arch", "architecture", "model_name"),
    "tokenizer": ("vocab", "vocab_file", "vocabulary"),
}

_KINDS: Mapping[str, Sequence[str]] = {
    "univlc": ("clip", "contrastive", "infonce", "info_nce", "unicl"),
    "classify": ("ce", "class_names", "classification", "cross_entropy"),
    "lm": ("caption", "captioning", "causal_lm", "clm", "generation"),
    "vlm": ("match", "matching", "vtm"),
    "mlm": ("masked_language_modeling", "masked_lm"),
    "mrm": ("mae", "masked_image_modeling", "mim", "mpp"),
}


def _inverted(table: Mapping[str, Sequence[str]]) -> Mapping[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name, others in table.items():
        for other in others:
            found[other] = (*found.get(other, ()), name)
    return MappingProxyType(found)


_FIELDS_OF, _KINDS_OF = _inverted(_FIELDS), _inverted(_KINDS)


def field_here(name: str, section: Sequence[str], known: Sequence[str]) -> str | None:
    """What to write instead of a field that is called otherwise here.

    Args:
        name: The key that is not known.
        section: Where it stands: names of sections, without numbers of stages and entries.
        known: The keys that are allowed there.

    Returns:
        The field as it is written there, or from the stage's or the plan's top; None if no field is called so, or only
        at another level than that of a name without a section.
    """
    for target in _FIELDS_OF.get(name.lower(), ()):
        parts = target.split(".")
        inside = [part for part in section if part != "stages"]
        if inside and parts[: len(inside)] == list(inside) and len(parts) > len(inside):
            return ".".join(parts[len(inside) :])
        if parts != [*inside, name]:
            if not section and parts[0] not in known:
                return f"{target} in a stage: stages.0.{target}"
            return target if not inside or parts[0] in known else f"{target} of the stage"
    return None


def kind_here(name: str, known: Sequence[str]) -> str | None:
    """The kind of an objective that other projects call ``name``; None if there is none among those known."""
    return next((kind for kind in _KINDS_OF.get(name.lower(), ()) if kind in known), None)
