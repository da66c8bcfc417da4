"""Transformers' Trainer for mixtures of experts, and for dense models on the same terms."""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_moe.errors import TrainingError, UsageError
from hf_moe.modeling.modeling_moe import MoePreTrainedModelMixin
from hf_moe.modeling.moe_state import RouterState
from hf_moe.routing import RoutingMonitor
from hf_moe.routing.callbacks import RouterBiasCallback
from hf_moe.routing.hooks import experts_of
from hf_moe.tasks import embed

from . import losses
from .checkpoints import RunState, last_checkpoint
from .collate import SeededCollator
from .compute import Active, count_active, count_tokens
from .distributed import set_leaf_modules
from .figures import Figures
from .freezing import GradualUnfreezing, kind_of
from .nonfinite import first_bad_output, first_bad_tensor
from .optimizer import ROUTERS, give_routers_a_rate, without_decay


class MoeTrainer(Trainer):
    """Trainer, with what a mixture needs, and a curve that resuming does not change.

    - Logs `aux_loss`, `z_loss` and `router_entropy` apart, and `task_loss`, what is left of `loss` without them;
      `tokens_per_second`, `tokens_seen` (no padding) and `active_flops` (`compute.FORMULA`); routing by
      `RoutingMonitor`, before the reporters see the log, with the load of each expert for them alone. `loss` includes
      the weighted routers' losses while training; in evaluation it is the task's alone, without label smoothing.
    - Label smoothing keeps the routers' losses.
    - A head that leaves `num_items_in_batch` unread, as dense heads do, has its loss weighted here: a step's gradient
      does not depend on how it is split.
    - A loss, gradient or weight that is not finite ends the run; see `TrainingError`'s words for where.
    - What collators draw follows from rows and epoch (`SeededCollator`); evaluation leaves the random numbers of
      training alone.

    Args:
        router_learning_rate: the routers' own, scaled by the same schedule.
        contrastive_scale: train sentence embeddings, by cosines times this.
        kept: put into every checkpoint (JSON-able), such as the recipe.
    """

    model: Any  # Trainer allows for none before it is set
    args: Any
    optimizer: Any

    def __init__(
        self,
        *args: Any,
        router_learning_rate: float | None = None,
        contrastive_scale: float | None = None,
        kept: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.router_learning_rate = router_learning_rate
        self.contrastive_scale = contrastive_scale
        self.kept = kept or {}
        base = self._base_model()
        self.is_ours = isinstance(base, MoePreTrainedModelMixin)
        self.monitor = RoutingMonitor.join(self, per_expert=True) if is_mixture(self.model) else None
        if self.monitor is not None:
            set_leaf_modules(self.model, self.accelerator)
        if self._moves_router_bias(base):
            self.add_callback(RouterBiasCallback())
        self.figures = Figures()
        self.add_callback(self.figures)
        self.run_state = RunState(self)
        self.add_callback(self.run_state)
        self.active, self.active_at = Active(0, 0), -1  # parameters, as of a step
        self.reads_num_items: bool | None = True if self.is_ours else None
        self.router_rate: float | None = None
        self.group_by: torch.Generator | None = None  # what groups of like length are drawn by

    def _base_model(self) -> Any:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _moves_router_bias(self, base: Any) -> bool:
        if not self.is_ours or base.config.router_type != "sigmoid" or not base.config.router_bias_update_rate:
            return False
        return any(p.requires_grad for name, p in self.model.named_parameters() if kind_of(name) == "router")

    # ---- data

    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def get_train_dataloader(self):
        collator, self.train_collator = self.data_collator, SeededCollator(self.data_collator, self._data_seed())
        self.data_collator = self.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler) and sampler.generator is None:
            # else each process would group by its own random numbers, and a resumed one by others
            self.group_by = sampler.generator = torch.Generator()
        return sampler

    def _get_eval_sampler(self, eval_dataset):
        """In their order: predictions are looked up by it."""
        strategy, self.args.train_sampling_strategy = self.args.train_sampling_strategy, "sequential"
        try:
            return super()._get_eval_sampler(eval_dataset)
        finally:
            self.args.train_sampling_strategy = strategy

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        with torch.random.fork_rng(devices=[]):
            return super().evaluation_loop(*args, **kwargs)

    # ---- optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return without_decay(model, super().get_decay_parameter_names(model))

    def create_optimizer(self, model: nn.Module | None = None):
        fresh = self.optimizer is None
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, GradualUnfreezing):
                callback.let_all_train()  # until training begins
        optimizer = super().create_optimizer(model)
        if fresh and self.router_learning_rate is not None:
            give_routers_a_rate(optimizer, self.model if model is None else model, self.router_learning_rate)
        return optimizer

    # ---- loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        training = model.training
        share = losses.label_share(inputs, num_items_in_batch, shifted=self._loss_shifts_labels)
        if training and self.monitor is not None and not self.is_ours:
            inputs = {**inputs, "output_router_logits": True}  # or Transformers' mixtures have no loss of balance
        if self.contrastive_scale is not None:
            loss, outputs = self._contrastive(model, inputs)
            loss = self._scaled(loss, share)
        else:
            unread = share is not None and not self._is_one_part() and not self._reads_num_items(model, inputs)
            smoother, self.label_smoother = self.label_smoother, self.label_smoother if training else None
            smoothed = self.label_smoother is not None and "labels" in inputs
            try:
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            finally:
                self.label_smoother = smoother
            if share is not None and unread and not smoothed:
                # Trainer has multiplied it by the processes already; a mean over no labels is NaN
                loss = torch.where(share > 0, loss, 0.0) * share
        if training:
            loss = self._with_router_losses(loss, outputs, share)
        return (loss, outputs) if return_outputs else loss

    def _with_router_losses(self, loss: torch.Tensor, outputs: Any, share: torch.Tensor | None) -> torch.Tensor:
        """Adds the routers' losses where the head has not, and notes them."""
        terms = losses.router_terms(outputs)
        if not terms:
            return loss
        parts = {name: self._scaled(value, self._share_of(name, share)) for name, value in terms.items()}
        if "loss" not in outputs or self.contrastive_scale is not None:
            loss = loss + losses.weighted(parts, self.model.config)
        elif not self.is_ours and share is not None and self.reads_num_items:
            # the head divided the task's loss by the step's labels, but not this (transformers #48690)
            whole = self._scaled(losses.weighted(terms, self.model.config), torch.ones_like(share))
            loss = loss + losses.weighted(parts, self.model.config) - whole
        self.figures.add(parts, 1 / self.current_gradient_accumulation_steps if share is None else 1.0)
        return loss

    def _share_of(self, name: str, share: torch.Tensor | None) -> torch.Tensor | None:
        """The share that one of the routers' losses has, as our heads weigh it."""
        if name != "aux_loss" or share is None or not self.is_ours:
            return share
        return self._base_model().balance_share(share)

    def _scaled(self, loss: Any, share: torch.Tensor | None) -> Any:
        """A mean over a micro-batch as its share of a step's loss, as Trainer scales it; where it has no share,
        Trainer divides by the number of micro-batches itself."""
        if share is None:
            return loss
        if not self.args.average_tokens_across_devices:
            return loss * share
        return loss * share * (self.accelerator.num_processes // self.get_tp_size())

    def _contrastive(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        state = RouterState() if self.is_ours and model.training else None
        sides, outputs = embed(model, inputs, **({} if state is None else {"router_state": state}))
        loss = losses.contrastive_loss(
            sides["anchor"], sides["positive"], sides.get("negative"), float(self.contrastive_scale or 1.0)
        )
        made = {"loss": loss, "embeddings": torch.stack(list(sides.values()), dim=1)}
        if state is not None:
            made |= self._base_model()._router_losses(state)
        elif (aux := getattr(outputs, "aux_loss", None)) is not None:
            made["aux_loss"] = aux
        return loss, made

    def _is_one_part(self) -> bool:
        """Whether a micro-batch is all of its step."""
        return self.args.gradient_accumulation_steps == 1 and self.accelerator.num_processes == 1

    def _reads_num_items(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Whether the head divides its loss by `num_items_in_batch`, as Trainer believes of all that take any keyword:
        asked once, with a number that can't be right."""
        if self.reads_num_items is None:
            training = model.training
            model.eval()
            with torch.no_grad(), self.compute_loss_context_manager():
                mean = model(**inputs)["loss"]
                labels = inputs["labels"].ne(-100).sum()
                self.reads_num_items = not torch.isclose(mean, model(**inputs, num_items_in_batch=2 * labels)["loss"])
            model.train(training)
        return self.reads_num_items

    # ---- what a run begins from, and what stops it

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_checkpoint(self.args.output_dir) or "")
        if resume_from_checkpoint == "":
            raise UsageError(f"{self.args.output_dir}: holds no whole checkpoint to resume from.")
        self.run_state.begin(Path(resume_from_checkpoint) if resume_from_checkpoint else None)
        return super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.run_state.is_over():
            self.control.should_training_stop = True  # Trainer would do a step before it looks
            return
        kwargs |= self.run_state.begin_pass(**kwargs)
        self.train_collator.set_epoch(kwargs["epoch"])
        if self.group_by is not None:
            self.group_by.manual_seed(self._data_seed() + kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except FloatingPointError as error:
            why = str(error).partition(". ")[0]
            # looking further needs all processes that share a model, and the others are past this
            raise self._stopped(why if self._is_sharded() else f"{why}; {self._culprit(inputs)}") from error
        if not self._is_finite(loss):
            told = f"the loss is {float(loss)}" if not torch.isfinite(loss) else "another process's loss is not finite"
            raise self._stopped(f"{told}; {self._culprit(inputs)}")
        return loss

    def _is_finite(self, loss: torch.Tensor) -> bool:
        """Of processes that share a model, in all of them: one that ended alone would leave the others waiting."""
        finite = torch.isfinite(loss)
        return bool(self.accelerator.gather(finite).all() if self._is_sharded() else finite)

    def _culprit(self, inputs: dict[str, Any]) -> str:
        where = first_bad_output(self.model, self._prepare_inputs(inputs))
        return f"the first output that is not finite is that of {where}" if where else "all outputs are finite"

    def _clip_grad_norm(self, model):
        if not self._holds_whole_gradients():
            return self._checked(super()._clip_grad_norm(model))
        norm = self._checked_norm(model)
        clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is not None:
            return super()._get_grad_norm(model, grad_norm)
        if self._holds_whole_gradients():
            return self._checked_norm(model)
        return self._checked(super()._get_grad_norm(model))

    def _is_sharded(self) -> bool:
        """Whether processes hold parts of the model each."""
        whole = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        return self.is_distributed_loading_by_transformers or self.accelerator.distributed_type not in whole

    def _holds_whole_gradients(self) -> bool:
        """Whether gradients are plain tensors, neither sharded nor scaled. (Scaled ones that overflow skip a step.)"""
        return not self._is_sharded() and getattr(self.accelerator, "scaler", None) is None

    def _checked(self, norm: Any) -> Any:
        """A norm that the library computed, of gradients that are not here whole."""
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if whole is not None and getattr(self.accelerator, "scaler", None) is None and not math.isfinite(whole):
            raise self._stopped("a gradient is not finite, by their norm")
        return norm

    def _checked_norm(self, model: nn.Module) -> torch.Tensor:
        """Of all gradients, before clipping by it makes every one of them NaN."""
        norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if not torch.isfinite(norm):
            last_first = reversed(list(self.model.named_parameters()))  # gradients come from above
            where = first_bad_tensor((name, parameter.grad) for name, parameter in last_first)
            raise self._stopped(f"a gradient is not finite, {f'first that of {where}' if where else 'by their norm'}")
        return norm

    def _save_checkpoint(self, model, trial):
        if where := first_bad_tensor(self.model.named_parameters()):
            raise self._stopped(f"the weights of {where} are not finite")
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.run_state.save(output_dir)

    def _stopped(self, why: str) -> TrainingError:
        good = last_checkpoint(self.args.output_dir)
        left = f"The last good checkpoint is {good}" if good else "No checkpoint was saved before"
        step = self.state.global_step + 1
        return TrainingError(f"step {step}: {why.rstrip('.')}. {left}; try a lower learning_rate or max_grad_norm.")

    # ---- logs and cost

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of a training step by `compute.FORMULA`; Trainer adds them up as `total_flos`."""
        if self.active_at != self.state.global_step:
            self.active, self.active_at = count_active(self.model), self.state.global_step
        tokens = count_tokens(inputs)
        self.figures.tokens += tokens
        return round(self.active.flops(tokens))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            figures = self.figures.read(self.accelerator, self.state.global_step - self.run_state.logged_at)
            self.run_state.logged_at = self.state.global_step
            terms = {name: figures[name] for name in losses.TERMS if name in figures}
            if terms:
                logs["task_loss"] = logs["loss"] - float(losses.weighted(terms, self.model.config))
            logs |= figures | {"active_flops": self.state.total_flos}
            if self.router_rate is not None:
                logs["router_learning_rate"] = self.router_rate
        if "train_loss" in logs:
            logs["train_loss"] = self.run_state.mean_loss()
            logs["tokens_seen"] = self.figures.read(self.accelerator, 1)["tokens_seen"]  # after the last log, too
        super().log(logs, start_time)

    def _get_learning_rate(self):
        self.router_rate = next((float(g["lr"]) for g in self.optimizer.param_groups if g.get(ROUTERS)), None)
        return super()._get_learning_rate()


def is_mixture(model: nn.Module) -> bool:
    """Whether it has experts, ours or Transformers'."""
    try:
        return bool(experts_of(model))
    except UsageError:
        return False
