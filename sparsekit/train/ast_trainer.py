"""AST: learn a 2:4 mask, and the weights under it, while distilling from the dense original (arXiv 2407.20584).

A step: gradients of the loss on W * m, clipped; AdamW on the dense W; removed entries pulled towards zero with
lambda(t); every few steps the mask is chosen anew from |W|. All of that is `MaskedAdamW`; here are the schedules, the
loss, the first mask and the low-rank branches. Masks change after an optimizer step and nowhere else, so that
accumulation and gradient checkpointing see one mask, and every rank chooses the same.
"""

import copy
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from sparsekit.archs import vocabulary_size
from sparsekit.calibration import Hessian, Walk, load_samples
from sparsekit.errors import Unsupported
from sparsekit.interrupt import uninterrupted
from sparsekit.masks import Mask
from sparsekit.nn.places import replace_layer_
from sparsekit.nn.side import SideLinear, block_indicator, install_side_, side_layers
from sparsekit.patterns import NM
from sparsekit.plan import MadeBy, Plan, SideBranch
from sparsekit.prune import installed_versions
from sparsekit.targets import find_targets, is_conv1d, set_weight_NK_, weight_NK
from sparsekit.train.ast_config import ASTConfig
from sparsekit.train.data import IGNORED, collate
from sparsekit.train.distill import TeacherOutput, TopK, distillation_loss, square_head
from sparsekit.train.fake_quant import FakeQuant, begin_rounding_
from sparsekit.train.lowrank import fit_side
from sparsekit.train.optimizer import MaskedAdamW, MaskStatistics
from sparsekit.train.refit import refit_branches_
from sparsekit.train.schedules import MaskedDecay, begun_anew, peak_for
from sparsekit.train.start import one_shot_, part_for
from sparsekit.train.teacher_cache import CachedTeacher
from sparsekit.train.teachers import Teacher, teaching_copy
from sparsekit.train.trainer import (
    Callback,
    SparseTrainer,
    from_first_rank,
    own_state_of,
    same_on_all_ranks_,
    shifted,
)

FOLLOW = 0.3
"""lambda * rms(W) / rms(M) at its peak, where lambda follows the gradients. The useful range is 0.1 to 1."""

ROUNDING_RATE = 0.2
"""Share of `learning_rate` at which the phase that rounds begins, at least."""


class ASTTrainer(SparseTrainer):
    """Trains a causal language model to N:M; see `ASTConfig` for what can be chosen.

    The model is changed in place: its masked weights are zero from the first step on. `plan()` then gives the masks
    and branches.

    Args:
        model: the dense model, the student from here on.
        args: what to do.
        train_dataset, eval_dataset: text, or tokens; see `sparsekit.train.data.training_samples`.
        processing_class: tokenizer, for text.
        teacher: the dense original, which stays in its dtype; None takes a copy of `model`, see `teaching_copy`. Not
            used where the loss needs none.
        **kwargs: of `transformers.Trainer`.
    Raises:
        ValueError: bad arguments or data, or a teacher with another vocabulary.
        Unsupported: DeepSpeed or FSDP1.
    """

    args: ASTConfig

    def __init__(
        self,
        model: nn.Module,
        args: ASTConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        teacher: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        layers = find_targets(model, args.targets, args.ignore)
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, **kwargs)
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.state.is_fsdp2):
            raise Unsupported(
                "DeepSpeed and FSDP1 cut weights into flat pieces, and masks need whole groups of a row: use FSDP2 "
                "(fsdp_config={'version': 2}) or DDP"
            )
        self.layer_names = list(layers)
        frozen = [name for name, layer in layers.items() if not layer.get_parameter("weight").requires_grad]
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "model: all of its parameters are frozen, so nothing can learn: model.requires_grad_(True)"
            )
        if frozen:
            self.notes.append(
                f"{len(frozen)} layers are frozen, as {frozen[0]}: masked, but neither weights nor masks learn there"
            )
        self.teacher: Teacher | None = None
        if args.needs_teacher:
            if teacher is model:
                raise ValueError("teacher is the model itself, which trains: leave it out, and a copy is made")
            teacher = teaching_copy(model, args.autocast_dtype) if teacher is None else teacher
            _refuse_other_vocabulary(model, teacher)
            self.teacher = Teacher(teacher.to(args.device))
            same_on_all_ranks_(self.teacher, args)
        if args.teacher_cache is not None and self.train_samples is not None:
            cache = CachedTeacher(args.teacher_cache)
            self.train_dataset = cache.attach(self.train_samples, args.temperature, vocabulary_size(model))
        self.mask_statistics: MaskStatistics | None = None
        self._first_keep: dict[str, Tensor] = {}
        self._has_refreshed = False
        self._refits = args.slorb_group is not None and args.slorb_refit
        if self._refits and (reason := _why_no_refit(self.teacher, layers)):
            self._refits = False
            self.notes.append(f"branches: not to be fitted again when the masks freeze, for {reason}")
        self._decay = MaskedDecay(0.0, 0)
        self._rounding: FakeQuant | None = None
        self.add_callback(Callback(self._begin, self._before_step, self._after_step))

    # --- before the first step -------------------------------------------------------------------------------------

    def _before_training(self, checkpoint: str | None) -> None:
        """Choose the first mask and the branches; a resumed run reads both from its checkpoint."""
        model = self.accelerator.unwrap_model(self.model)
        layers = {name: model.get_submodule(name) for name in self.layer_names}
        if checkpoint is None:
            self._first_keep = self._start(model, layers)
        elif self.args.slorb_group is not None:
            self._install_branches(model, layers, None)

    def _start(self, model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
        """Write the weights to start from into the model, dense; return the first masks [N, K]."""
        dense = {name: weight_NK(layer).to("cpu", copy=True) for name, layer in layers.items()}
        try:
            return self._started(model, layers, dense)
        except BaseException:
            with uninterrupted():
                for name, layer in layers.items():
                    if model.get_submodule(name) is not layer:
                        replace_layer_(model, name, layer)
                    set_weight_NK_(layer, dense[name])
            raise

    def _started(self, model: nn.Module, layers: dict[str, nn.Module], dense: dict[str, Tensor]) -> dict[str, Tensor]:
        args = self.args
        if isinstance(args.start, Plan):
            plan = part_for(args.start, layers, args.pattern, "start")
            self.notes += plan.notes
        else:
            plan = one_shot_(self, model, args.start)
        masks = plan.masks
        keep = {  # one-shot methods leave out what is zero throughout
            name: masks[name].keep if name in masks else args.parsed_pattern.project(w_NK.abs())
            for name, w_NK in dense.items()
        }
        with torch.no_grad():
            for name, layer in layers.items():
                weight_NK(layer).masked_fill_(~keep[name].to(weight_NK(layer).device), 0)
        if args.slorb_group is not None:
            self._install_branches(model, layers, dense)
        for name, w_NK in dense.items():
            layer = model.get_submodule(name)
            now = weight_NK(layer)
            kept = keep[name].to(now.device)
            set_weight_NK_(layer, with_removed(now, w_NK.to(now.device), kept, args.parsed_pattern))
        if self.args.world_size > 1:
            for name, mask in keep.items():  # one choice for all, whatever rounding made of it elsewhere
                keep[name] = from_first_rank(mask.to(args.device)).cpu()
            same_on_all_ranks_(model, args)
        return keep

    def _install_branches(
        self, model: nn.Module, layers: dict[str, nn.Module], dense: dict[str, Tensor] | None
    ) -> None:
        """Put a branch beside every layer, fitted to what it lacks of `dense`; without that, one that adds nothing.

        What a layer lacks is the removed weights, and, where the method that removed them made the kept ones take over
        a part of their work, less than that.
        """
        group, init, train_x = self.args.slorb_group, self.args.slorb_init, self.args.slorb_train_x
        assert group is not None

        def install(name: str, hessian: Hessian | None) -> None:
            w_NK = weight_NK(layers[name])
            lack = torch.zeros_like(w_NK) if dense is None else dense[name].to(w_NK.device) - w_NK
            kept = torch.zeros_like(w_NK, dtype=torch.bool)  # of what is lacking, nothing is there
            method = init if hessian is not None or init == "svd" else "mean"
            matrix = None if hessian is None else hessian.matrix
            try:
                branch = fit_side(lack, kept, group=group, method=method, hessian=matrix)
            except ValueError as error:
                raise ValueError(f"slorb_group={group}, slorb_init={init!r}: no branch for {name}: {error}") from error
            if dense is not None and method != init:
                self.notes.append(f"{name}: no calibration token reached it: its branch is fitted to the mean")
            if train_x and branch.X is None:
                branch = dataclasses.replace(branch, X=block_indicator(w_NK.shape[1], group))
            layer = install_side_(model, name, branch)
            if layer.side_X is not None:
                layer.side_X.requires_grad_(train_x)

        if init == "mean" or dense is None:
            for name in layers:
                install(name, None)
            return
        number = self.args.num_calibration_samples
        samples = load_samples(self.calibration_inputs(number), model, num_samples=number, seed=self.args.seed)
        with Walk(model, layers, samples.batches) as walk:
            for step in walk.steps:
                for name, statistics in walk.measure(step, Hessian).items():
                    assert statistics is None or isinstance(statistics, Hessian)
                    install(name, statistics)
                walk.finish(step)

    # --- the optimizer ---------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            args = self.args
            self.optimizer = MaskedAdamW(
                self._parameter_groups(model or self.accelerator.unwrap_model(self.model)),
                pattern=args.parsed_pattern,
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                masked_decay_kind=args.masked_decay_kind,
                hysteresis=args.hysteresis,
                keep=self._first_keep,
            )
            self._first_keep = {}  # the optimizer gives each up as it takes it
        return self.optimizer

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Masked weights, other matrices, and what is never decayed: vectors and the branches."""
        masked: dict[str, tuple[nn.Parameter, bool]] = {}
        for name in self.layer_names:
            layer = model.get_submodule(name)
            masked[name] = layer.get_parameter("weight"), is_conv1d(layer)
        taken = {id(parameter) for parameter, _ in masked.values()}
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        branches: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if id(parameter) in taken or not parameter.requires_grad:
                continue
            if name.rpartition(".")[2].startswith("side_"):
                branches[name] = parameter
            else:
                (decayed if parameter.dim() >= 2 else plain).append(parameter)
        wd = self.args.weight_decay
        groups: list[dict[str, Any]] = [
            {
                "params": [parameter for parameter, _ in masked.values()],
                "names": list(masked),
                "transposed": [transposed for _, transposed in masked.values()],
                "masked": True,
                "weight_decay": wd,
            },
            {"params": decayed, "weight_decay": wd},
            {"params": plain, "weight_decay": 0.0},
        ]
        if branches:
            groups.append({"params": list(branches.values()), "branch": list(branches), "weight_decay": 0.0})
        return groups

    @property
    def masked_optimizer(self) -> MaskedAdamW:
        """The optimizer, out of accelerate's wrapper."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        assert isinstance(optimizer, MaskedAdamW)
        return optimizer

    # --- schedules -------------------------------------------------------------------------------------------------

    @property
    def freeze_step(self) -> int:
        """Step after which masks stay."""
        return self._phases(self.state.max_steps)[0]

    @property
    def quantise_step(self) -> int | None:
        """Step after which the forward sees weights on the grid of `format`; None where it never does."""
        return self._phases(self.state.max_steps)[1]

    def _phases(self, max_steps: int) -> tuple[int, int | None]:
        """Return both for a run of so many steps."""
        freeze = round(max_steps * (1 - self.args.mask_freeze_ratio))
        quantise = max(round(max_steps * (1 - self.args.quantise_ratio)), freeze)
        return freeze, quantise if self.args.format is not None else None

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the schedule as ever, with rates in the phase that rounds at which weights can move on the grid."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        _, start = self._phases(num_training_steps)
        if start is not None and isinstance(scheduler, LambdaLR):
            scheduler.lr_lambdas = [
                begun_anew(rates, start, num_training_steps, ROUNDING_RATE) for rates in scheduler.lr_lambdas
            ]
        return scheduler

    def _begin(self) -> None:
        args, warmup = self.args, round(self.state.max_steps * self.args.masked_decay_warmup)
        is_decoupled = args.masked_decay_kind == "decoupled"
        if args.masked_decay != "auto":
            peak = float(args.masked_decay)
        elif is_decoupled:
            if not self._knows_rates:
                raise ValueError(
                    f"lr_scheduler_type={args.lr_scheduler_type!r} is not known in advance, which masked_decay='auto' "
                    "needs: give masked_decay as a number, or take a schedule such as 'cosine'"
                )
            peak = peak_for(self._learning_rate, warmup, self.freeze_step, self.state.max_steps)
        else:
            peak = FOLLOW
        self._decay = MaskedDecay(peak, warmup)
        if is_decoupled and peak > 0:
            highest = max(self._learning_rate(step) * self._decay(step) for step in range(self.state.max_steps))
            if highest > 1:
                raise ValueError(
                    f"masked_decay={peak:g} times the learning rate reaches {highest:.3g}, and above 1 removed weights "
                    f"would swing around zero and grow. Use at most {peak / highest:.3g}, or 'auto'"
                )
        self.masked_optimizer.mask_()
        self.without_fp32_copies()
        if self.state.global_step == self.freeze_step == 0:
            self._after_step()
        elif self.quantise_step is not None and self.state.global_step >= self.quantise_step:
            assert self._checkpoint is not None, "only a resumed run begins so late"
            self._round(own_state_of(self._checkpoint)["z_scales"])

    @property
    def _knows_rates(self) -> bool:
        return isinstance(getattr(self.lr_scheduler, "scheduler", self.lr_scheduler), LambdaLR)

    def _learning_rate(self, step: int) -> float:
        """Return the rate of a step; the highest there can be, where the schedule is not known in advance."""
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        if not isinstance(scheduler, LambdaLR):
            return self.args.learning_rate
        return float(scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step))

    def _before_step(self) -> None:
        optimizer, value = self.masked_optimizer, self._decay(self.state.global_step)
        follows = self.args.masked_decay == "auto" and self.args.masked_decay_kind != "decoupled"
        optimizer.masked_decay, optimizer.follow = (None, value) if follows else (value, 0.0)

    def _after_step(self) -> None:
        step, every = self.state.global_step, self.args.mask_update_steps
        if every and step % every == 0 and 0 < step <= self.freeze_step:
            self.mask_statistics, self._has_refreshed = self.masked_optimizer.refresh_masks_(), True
        if step == self.freeze_step and self._refits:
            self._refit_branches()
        if step == self.quantise_step:
            self._round()

    def _round(self, z_scales: dict[str, float] | None = None) -> None:
        """From now on write weights and branches on the grid of `format`."""
        assert self.args.format is not None
        layers = self._layers_with_branch()
        self._rounding = begin_rounding_(self.masked_optimizer, self.args.format, layers, z_scales)

    def _own_state(self) -> dict[str, Any]:
        branches = {} if self._rounding is None else self._rounding.branches
        return {"z_scales": {name: branch.z_scale for name, branch in branches.items()}}

    def _layers_with_branch(self) -> dict[str, SideLinear]:
        return side_layers(self.accelerator.unwrap_model(self.model))

    def _refit_branches(self) -> None:
        """Fit S once more to what the layers lack now that the masks stay; every rank does the same."""
        assert self.teacher is not None
        model, teacher, size = self.model_wrapped, self.teacher.model, self.args.per_device_train_batch_size
        samples = self.calibration_samples(self.args.num_calibration_samples)
        alone = [{key: value[0] for key, value in sample.items()} for sample in samples]
        batches = [self._prepare_inputs(collate(alone[i : i + size])) for i in range(0, len(alone), size)]
        inputs = [self._prepare_inputs(sample) for sample in self.calibration_inputs(len(samples))]
        was_training = model.training

        def run(batch: dict[str, Tensor]) -> None:
            model(**batch, use_cache=False)

        def loss() -> float:
            found = [self._losses_of(model, batch, distils=True)[0] for batch in batches]
            return float(from_first_rank(torch.stack(found).mean()))

        try:
            model.eval()
            with torch.no_grad(), self.accelerator.autocast():
                student = self.accelerator.unwrap_model(model)
                self.notes.append(refit_branches_(student, teacher, inputs, run, loss))
                same_on_all_ranks_(student, self.args)
        finally:
            model.train(was_training)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            optimizer = self.masked_optimizer
            logs["masked_decay"] = optimizer.mean_masked_decay
            found = dataclasses.asdict(optimizer.statistics())
            flips = found.pop("flip_rate")
            if self._has_refreshed or self.state.global_step > self.freeze_step:
                logs["flip_rate"] = flips if self._has_refreshed else 0.0
            logs |= found
            self._has_refreshed = False
        super().log(logs, start_time)

    def what_may_diverge(self) -> str:
        return f"lower masked_decay={self.args.masked_decay!r} or learning_rate={self.args.learning_rate}"

    # --- the loss --------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        total, outputs, parts = self._losses_of(model, inputs, model.training, num_items_in_batch)
        if model.training:
            self.note_losses(**parts)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = total * self.accelerator.num_processes
        return (total, outputs) if return_outputs else total

    def _losses_of(
        self, model: nn.Module, inputs: dict[str, Any], distils: bool, num_items: Any = None
    ) -> tuple[Tensor, Any, dict[str, Tensor]]:
        """Return the loss, the model's outputs, and the parts of the loss as means over this batch's tokens.

        Args:
            distils: False for the cross entropy alone, as in evaluation.
            num_items: tokens of the whole step, of which these are a share.
        """
        args = self.args
        labels = shifted(inputs["labels"])
        batch = {key: value for key, value in inputs.items() if key != "labels" and not key.startswith("teacher_")}
        matches_hidden = distils and args.square_head_weight > 0
        outputs = model(**batch, use_cache=False, output_hidden_states=matches_hidden)
        taught: TeacherOutput | None = None
        if distils and "teacher_ids" in inputs:
            taught = TopK(inputs["teacher_ids"], inputs["teacher_log_probs"])
        elif distils and self.teacher is not None:
            with self.accelerator.autocast():
                taught = self.teacher.outputs(batch, output_hidden_states=matches_hidden)
        loss = distillation_loss(
            outputs.logits,
            taught,
            labels,
            kd_weight=args.kd_weight if distils else 0.0,
            ce_weight=float(args.ce_weight or 0.0) if distils else 1.0,
            temperature=args.temperature,
            kind=args.kd_kind,
            num_items=num_items,
        )
        share = 1.0 if num_items is None else (labels != IGNORED).sum().clamp(min=1) / num_items
        total, parts = loss.total, {"ce_loss": loss.ce / share, "kd_loss": loss.kd / share}
        if matches_hidden:
            assert self.teacher is not None
            mask = batch.get("attention_mask")
            parts["hidden_loss"] = square_head(
                outputs.hidden_states[1:], self.teacher.hidden_states[1:], attention_mask=mask
            )
            total = total + args.square_head_weight * parts["hidden_loss"] * share
        return total, outputs, parts

    # --- after the last step ---------------------------------------------------------------------------------------

    def trained_model(self) -> nn.Module:
        """Return the model, whole: the one that was given, or, where it is sharded, one put together from all ranks.

        Where it is sharded, all ranks must call this, and the first alone gets the weights.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            return model
        state = self.accelerator.get_state_dict(self.model_wrapped)
        whole: Any = type(model)
        whole = whole(model.config)
        if hasattr(model, "generation_config"):
            whole.generation_config = copy.deepcopy(model.generation_config)
        for name, branch in self.plan().side.items():
            install_side_(whole, name, branch)
        if self.is_world_process_zero():
            whole.load_state_dict(state)
        return whole

    def plan(self) -> Plan:
        """Return the masks, branches and scales as they are now, on every rank.

        Raises:
            ValueError: training has not begun.
        """
        if self.optimizer is None:
            raise ValueError("there is no mask yet: call train() first")
        model, samples = self.accelerator.unwrap_model(self.model), self.train_samples
        masks = {name: Mask(self.args.pattern, keep) for name, keep in self.masked_optimizer.keep().items()}
        made_by = MadeBy(
            method=self.args.method,
            config=self.args.own_fields(),
            base_model=str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
            data_digest="" if samples is None else samples.digest,
            num_samples=0 if samples is None else len(samples),
            sample_length=0 if samples is None else max(len(sample["input_ids"]) for sample in samples.samples),
            seed=self.args.seed,
            versions=installed_versions(),
            updates_weights=True,
            targets=list(map(str, self.args.targets)),
            ignore=list(map(str, self.args.ignore)),
        )
        side = {
            name: SideBranch(_whole(layer.side_S), None if layer.side_X is None else _whole(layer.side_X), layer.group)
            for name, layer in self._layers_with_branch().items()
        }
        notes = list(self.notes)
        if self.args.mask_update_steps > self.freeze_step:
            notes.append(
                f"no mask was chosen anew: mask_update_steps={self.args.mask_update_steps} are more than the "
                f"{self.freeze_step} steps before the masks froze"
            )
        if self.state.global_step < self.freeze_step:
            notes.append(f"training ended at step {self.state.global_step}, before the masks froze")
        scales = {} if self._rounding is None else self._rounding.whole_scales(self.masked_optimizer)
        orders = self.args.start.perms if isinstance(self.args.start, Plan) else {}
        perms = {name: orders[name] for name in masks if name in orders}
        return Plan(masks, made_by, notes=notes, perms=perms, side=side, scales=scales)


def with_removed(kept_NK: Tensor, dense_NK: Tensor, keep_NK: Tensor, pattern: NM) -> Tensor:
    """Return the weights to start from: `kept_NK` where kept, and the dense ones elsewhere, none above a kept one.

    Without that bound the first choice by magnitude would undo what a better criterion chose: of SparseGPT's mask it
    would change a twentieth at once. Bounded, a removed weight comes back when gradients make it outgrow a kept one.
    """
    K, m = keep_NK.shape[1], pattern.m
    magnitudes = F.pad(kept_NK.abs().masked_fill(~keep_NK, torch.inf), (0, -K % m), value=torch.inf)
    least = magnitudes.unflatten(1, (-1, m)).amin(-1).repeat_interleave(m, 1)[:, :K]
    return torch.where(keep_NK, kept_NK, dense_NK.clamp(-least, least))


def _why_no_refit(teacher: Teacher | None, layers: dict[str, nn.Module]) -> str:
    """Return why there is nothing to fit branches to once the masks stay; "" where there is."""
    if teacher is None:
        return "there is no teacher in memory"
    known = dict(teacher.model.named_modules())
    for name, layer in layers.items():
        if name not in known or known[name].get_parameter("weight").shape != layer.get_parameter("weight").shape:
            return f"the teacher has no layer {name} of the same shape"
    return ""


def _refuse_other_vocabulary(student: nn.Module, teacher: nn.Module) -> None:
    sizes = [vocabulary_size(model) for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the teacher knows {sizes[1]} tokens and the student {sizes[0]}: distillation compares their next-token "
            "distributions, so pass a teacher with the student's own tokenizer, the dense original if there is one"
        )


def _whole(parameter: Tensor) -> Tensor:
    """Return a copy on the CPU, gathered from all ranks where the parameter is sharded."""
    detached = parameter.detach()
    return (detached.full_tensor() if isinstance(detached, DTensor) else detached).to("cpu", copy=True)
