"""NutePrune: learn which heads and channels go, with the model itself as its numerous teachers (arXiv 2402.09773).

What goes is chosen by a one-shot method, whose refitted readers the student takes for its own (`nuteprune_start`); or
by gates, which are drawn in each step, held to a sparsity that rises, and settled for the last steps, within the budget
exactly. LoRA makes up for what is gone; what teaches is the same model under earlier masks and LoRA, or none. Then LoRA
goes into the weights, what is closed becomes dead, and `apply_` cuts it out. See `nuteprune_student` for the step, and
`nuteprune_result` for what comes out.
"""

import copy
import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from sparsekit.archs import Width, find_widths, vocabulary_size
from sparsekit.budgets import Budget
from sparsekit.errors import CheckpointError, Unsupported
from sparsekit.files import replace_file
from sparsekit.methods.structured.slicegpt import Stream, is_tied, legal_hidden_sizes, untie_
from sparsekit.nn import side_layers
from sparsekit.plan import MadeBy, Plan
from sparsekit.prune import installed_versions
from sparsekit.prune_structured import left_whole_notes, targeted_widths
from sparsekit.residual import check_thin
from sparsekit.snapshot import Snapshot, restored_on_failure
from sparsekit.targets import find_targets, show_entries
from sparsekit.thin_stream import Thinner, left_out_layer
from sparsekit.train.adapters import check_takes_lora
from sparsekit.train.data import collate
from sparsekit.train.distill import TeacherOutput
from sparsekit.train.nuteprune_config import NutePruneConfig
from sparsekit.train.nuteprune_loss import student_loss
from sparsekit.train.nuteprune_result import Family, settle_
from sparsekit.train.nuteprune_start import calibration_batch_size, calibration_batches, turned_
from sparsekit.train.nuteprune_student import Member, Student, saved_table
from sparsekit.train.restore import restored_whole_on_failure
from sparsekit.train.teachers import Teacher
from sparsekit.train.trainer import SparseTrainer, TrainingDiverged, own_state_of, shifted

STATE_FILE = "nuteprune.safetensors"
"""In every checkpoint: LoRA, refitted readers, gates, multipliers, snapshots, and what was kept; all other weights are
those of the model."""

PROBES = 8
"""Samples, or a batch if that is less, on which distances to teachers are measured."""


class NutePruneTrainer(SparseTrainer):
    """Prunes a causal language model while training LoRA; see `NutePruneConfig` for what can be chosen.

    `train` returns with the model in its full shapes, LoRA merged, and what goes dead: `sparsekit.apply_(model,
    trainer.plan())` cuts it out. Where it fails, the model is bit for bit what it was.

    Args:
        model: the dense model.
        args: what to do.
        train_dataset, eval_dataset: text, or tokens; see `sparsekit.train.data.training_samples`.
        processing_class: tokenizer, for text.
        **kwargs: of `transformers.Trainer`.
    Raises:
        ValueError: bad arguments or data, or a model with adapters.
        Unsupported: FSDP or DeepSpeed, or a model whose parts are not known.
    """

    args: NutePruneConfig

    def __init__(
        self,
        model: nn.Module,
        args: NutePruneConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        check_takes_lora(model)
        layers = find_targets(model, args.targets, args.ignore)
        self._widths: list[Width] = targeted_widths(find_widths(model), layers) if args.prunes else []
        if not args.merge_lora and side_layers(model):
            raise ValueError(
                f"merge_lora=False: {next(iter(side_layers(model)))} has a branch beside its weight already; use "
                "merge_lora=True"
            )
        if args.hidden is None:
            args = copy.copy(args)  # the caller may prune another model by it
            args.hidden = _may_thin(model, layers, args)
        elif args.hidden and args.prunes:
            stream = Stream.of(model)
            if left_out := left_out_layer(stream, layers):
                raise ValueError(
                    f"hidden=True, and targets and ignore leave out {left_out}, which reads or writes hidden "
                    "dimensions: leave them at their defaults"
                )
            if is_tied(model, stream) and not args.untie:
                raise ValueError(
                    f"hidden=True, and {stream.head} shares its weight with {stream.embedding}: untie=True gives it "
                    "one of its own, or leave hidden out"
                )
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise Unsupported("gates are learnt beside the model, which cannot be sharded then: use DDP")
        self.notes += left_whole_notes(model, self._widths, layers) if self._widths else []
        self._base = _digest(model)
        self._student: Student | None = None
        self._teacher: Teacher | None = None
        self._plan: Plan | None = None
        self._family: Family | None = None
        self._told: list[Tensor] = []  # of each micro-batch: the loss on tokens, without that on hidden states
        self.add_callback(_Steps(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; as `SparseTrainer.train`. The model is plain again afterwards, whatever happens."""
        if self._plan is not None:
            raise ValueError("this trainer has pruned its model already: a new one starts anew, or resumes")
        model = self.accelerator.unwrap_model(self.model)
        try:
            with restored_on_failure(model) as snapshot:
                self._untie_(model, snapshot)
                with restored_whole_on_failure(model, twin=model):
                    result = super().train(*args, **kwargs)
                    plan, *outcome = self._settle_(model, snapshot)
                made = Family(model, self.args, *outcome)
            self._plan, self._family = plan, made
        finally:
            if self._student is not None:
                self._student.snapshots.clear()  # checkpoints hold them too
            self._student = self._teacher = None
        return result

    def _untie_(self, model: nn.Module, snapshot: Snapshot) -> None:
        if self.args.hidden and self.args.prunes and is_tied(model, stream := Stream.of(model)):
            untie_(model, stream, snapshot)
            self.notes.append(f"{stream.head} no longer shares its weight with {stream.embedding}")

    # --- before the first step -------------------------------------------------------------------------------------

    def _before_training(self, checkpoint: str | None) -> None:
        """Put gates and LoRA on the model; a resumed run reads them from its checkpoint."""
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        samples, self._told = self.train_samples, []
        if samples is None:
            raise ValueError("train_dataset is missing: training needs data")
        saved: dict[str, Tensor] = {}
        if checkpoint is not None:
            if not (Path(checkpoint) / STATE_FILE).is_file():
                raise CheckpointError(f"{checkpoint} holds no {STATE_FILE}: resume from another checkpoint")
            saved = load_file(Path(checkpoint) / STATE_FILE)
        folder = None
        if args.snapshots_on_disk:
            folder = Path(args.output_dir or ".") / "snapshots" / str(args.process_index)
        inputs = self.calibration_inputs(args.num_calibration_samples)
        turned: Tensor | None = None
        if args.hidden and args.is_one_shot:
            turned = turned_(
                model,
                saved.get("turned"),
                calibration_batches(model, inputs, args.seed, calibration_batch_size(args)),
            )
        self._student = Student(
            model,
            args,
            widths=self._widths,
            probe=self._probe(),
            length=sum(len(sample["input_ids"]) for sample in samples.samples) / len(samples),
            folder=folder,
            samples=inputs,
            turned=turned,
            table=None if checkpoint is None else saved_table(own_state_of(checkpoint)),
        )
        self._teacher = Teacher(model, freezes=False)
        if checkpoint is not None:
            self._student.load(saved, own_state_of(checkpoint))

    def _probe(self) -> dict[str, Tensor]:
        """Return a batch of training samples without labels, the same on all processes."""
        samples = [{key: value[0] for key, value in sample.items()} for sample in self._probed()]
        return {key: value for key, value in collate(samples).items() if key != "labels"}

    def _probed(self) -> list[dict[str, Tensor]]:
        return self.calibration_samples(min(PROBES, calibration_batch_size(self.args)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights are the model's own, and the rest is read in `_before_training`."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            args = self.args
            self.optimizer = torch.optim.AdamW(
                self.student.parameter_groups(), betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the schedule of LoRA, anew in each stage; gates and multipliers have constant rates."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if not isinstance(scheduler, LambdaLR):
            name = getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type)
            raise ValueError(
                f"lr_scheduler_type={name!r} changes the rate of gates, too: take one that "
                "is known in advance, as 'linear' or 'cosine'"
            )
        others = len(scheduler.optimizer.param_groups) - 1
        starts = [start for start, _ in self.args.stage_starts(num_training_steps)] or [0]
        lora = _restarting(scheduler.lr_lambdas[0], starts, num_training_steps)
        self.lr_scheduler = LambdaLR(scheduler.optimizer, [lora, *[_constant] * others])
        return self.lr_scheduler

    @property
    def freeze_step(self) -> int:
        """Step from which the gates are settled."""
        max_steps = self.state.max_steps or self.args.max_steps
        if max_steps <= 0:
            raise ValueError("the number of steps is known once train() has begun: give max_steps to know it before")
        return self.args.freeze_step(max_steps)

    @property
    def student(self) -> Student:
        """What is being trained."""
        if self._student is None:
            raise ValueError("nothing is being trained: call train()")
        return self._student

    # --- steps -----------------------------------------------------------------------------------------------------

    def begin_training(self) -> None:
        """Lay out the schedules over the steps; accelerate has wrapped the model by now."""
        self.without_fp32_copies()
        self.student.plan_steps(self.state.max_steps)
        if self.state.global_step and self._checkpoint is not None:
            assert self.student.schedule is not None
            self.student.schedule.load_state_dict(own_state_of(self._checkpoint)["schedule"])
        if self.state.global_step == 0:
            self.student.begin_due_stage_(0)  # before an evaluation at the start, which is of what is left then

    def begin_step(self) -> None:
        """Choose the teacher, and draw the gates that all micro-batches of the step see."""
        with self.accelerator.autocast():
            self.student.begin_step(self.state.global_step)
        if self.student.begins_stage:  # what was known of the old LoRA's gradients is not true of this one
            optimizer: Any = self.optimizer
            for parameter in optimizer.param_groups[0]["params"]:
                optimizer.state.pop(parameter, None)

    def before_step(self) -> None:
        """Bring the gates' gradients together."""
        self.student.pull_(self.state.global_step)
        self._refuse_non_finite("norm of the gradients of the gates", self.student.gate_gradient())

    def end_step(self) -> None:
        """Clamp gates; settle them when it is time."""
        self.student.end_step(self.state.global_step)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        args, student = self.args, self._student
        learns = model.training and student is not None
        labels = shifted(inputs["labels"])
        batch = {key: value for key, value in inputs.items() if key != "labels"}
        matches_hidden = learns and args.hidden_weight > 0 and args.teachers != "none"
        taught: TeacherOutput | None = None
        taught_hidden: tuple[Tensor, ...] = ()
        drawn = None if student is None else student.masked.masks
        if student is not None and not learns:
            student.masked.masks = student.settled()
        elif student is not None and args.teachers != "none":
            assert self._teacher is not None
            with self.accelerator.autocast(), student.roles.teacher(student.teacher):
                taught = self._teacher.outputs(batch, output_hidden_states=matches_hidden)
            taught_hidden, self._teacher.hidden_states = self._teacher.hidden_states, ()
        outputs = model(**batch, use_cache=False, output_hidden_states=matches_hidden)
        if student is not None:
            student.masked.masks = drawn  # micro-batches may follow an evaluation
        mask = batch.get("attention_mask")
        total, parts = student_loss(args, outputs, taught, taught_hidden, labels, mask, num_items_in_batch, learns)
        if learns:
            self.note_losses(**parts)
            self._told.append(args.ce_weight * parts["ce_loss"] + args.kd_weight * parts.get("kd_loss", 0.0))
        if num_items_in_batch is not None and args.average_tokens_across_devices and args.world_size > 1:
            total = total * self.accelerator.num_processes
        return (total, outputs) if return_outputs else total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._student is not None:
            logs |= self._student.log()
        super().log(logs, start_time)

    def _refuse_divergence(self, loss: float) -> None:
        """Stop where the student knows less than if it knew nothing. That a loss rises with the sparsity is no sign.

        What it says of tokens is judged, in nats per token: what hidden states differ by has no such limit.
        """
        told, self._told = self.mean_over_ranks(torch.stack(self._told).mean()), []
        args, vocabulary = self.args, vocabulary_size(self.accelerator.unwrap_model(self.model))
        if vocabulary is None:
            return
        kd_weight = 0.0 if args.teachers == "none" else args.kd_weight
        nothing = math.log(vocabulary) * (kd_weight * args.temperature**2 + args.ce_weight)
        if told > 2 * nothing > 0:
            raise TrainingDiverged(
                f"the loss on tokens is {told:.3g} at step {self.state.global_step + 1}, and would be {nothing:.3g} at "
                f"most if all were as likely: {self.what_may_diverge()}. {self._last_checkpoint()}"
            )

    def what_may_diverge(self) -> str:
        if self.args.is_one_shot and self.args.frozen_share == 1:
            return f"lower learning_rate={self.args.learning_rate}, or halt on the way, as stages=(0.2,)"
        return (
            f"lower learning_rate={self.args.learning_rate} or gate_learning_rate={self.args.gate_learning_rate}, or "
            f"raise sparsity_warmup={self.args.sparsity_warmup:.2g}"
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save as `Trainer` does; while training lasts, what it has learnt beside the weights, which stay."""
        if self._student is None:
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        with replace_file(folder / STATE_FILE) as temporary:
            save_file(self._student.tensors(), temporary)

    def _own_state(self) -> dict[str, Any]:
        return self.student.numbers()

    def _made_by(self) -> dict[str, Any]:
        return super()._made_by() | {"model": self._base}

    # --- after the last step ---------------------------------------------------------------------------------------

    def _settle_(self, model: nn.Module, snapshot: Snapshot) -> tuple[Any, ...]:
        """Make the model what it is to be, and return its plan, and what a family is made of."""
        student, args = self.student, self.args
        done = self.state.global_step
        if done < self.state.max_steps:
            self.notes.append(f"training ended at step {done} of {self.state.max_steps}")
        student.finish_(done)
        plan = self._plan_of(student)
        batch = self._prepare_inputs(self._probe())
        bare = Plan(made_by=plan.made_by, notes=list(self.notes))
        members: dict[float, Member] = {each.sparsity: each for each in student.members}
        members |= {args.sparsity: student.last_member()} if members else {}
        changing = _changing(student)
        whole = Snapshot(model)  # the outer one may hold what was there before the stream was turned
        for name, layer in changing.items():
            snapshot.remember(name, layer)
            if members:
                whole.remember(name, layer)
        originals = whole.originals() | (student.intact() if members else {})
        dense = {name: x for name, x in originals.items() if name.rpartition(".")[0] in changing}
        student.masked.remove()
        masks = {} if student.projected is None else student.projected.masks
        settle_(student.adapted, args, student.gates, masks, plan, batch)
        return plan, student.gates, bare, members, dense, batch

    def _plan_of(self, student: Student) -> Plan:
        args, samples, model = self.args, self.train_samples, self.accelerator.unwrap_model(self.model)
        made_by = MadeBy(
            method=args.method,
            config=args.own_fields(),
            base_model=str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
            data_digest="" if samples is None else samples.digest,
            num_samples=0 if samples is None else len(samples),
            sample_length=0 if samples is None else max(len(sample["input_ids"]) for sample in samples.samples),
            seed=args.seed,
            versions=installed_versions(),
            updates_weights=True,
            targets=show_entries(args.targets),
            ignore=show_entries(args.ignore),
        )
        if student.gates is None or student.projected is None or student.constraint is None:
            return Plan(made_by=made_by, notes=list(self.notes))
        notes = [*self.notes, *student.notes, *student.constraint.notes, *student.projected.notes]
        notes += _in_vain(model, student)
        if student.schedule is not None and student.schedule.collects and len(student.snapshots):
            taught, done = student.schedule.num_taught, self.state.global_step
            notes.append(f"snapshots taught in {taught} of {done} steps, and the intact model in the others")
        cuts = student.gates.cuts(student.projected.masks)
        return Plan(made_by=made_by, notes=list(dict.fromkeys(notes)), cuts=cuts)

    def plan(self) -> Plan:
        """Return what is left of the model.

        Raises:
            ValueError: training has not ended.
        """
        if self._plan is None:
            raise ValueError("there is no plan yet: call train() first")
        return self._plan

    def trained_model(self) -> nn.Module:
        """Return the model that was given."""
        return self.accelerator.unwrap_model(self.model)

    def family(self) -> Family:
        """Return the models of all sparsities that were kept on the way (`keep`), and that of the run, each cut.

        Raises:
            ValueError: training has not ended, or `keep` named none.
        """
        if self._family is None or not len(self._family):
            raise ValueError("there is no family: name smaller sparsities, keep=(0.1, 0.2), and call train()")
        return self._family


class _Steps(TrainerCallback):
    """Tells the trainer where in a step it is."""

    def __init__(self, trainer: NutePruneTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin_training()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.end_step()


def _restarting(schedule: Callable[[Any], float], starts: list[int], num_steps: int) -> Callable[[int], float]:
    """Return a schedule that begins anew with each stage, and is as much shorter.

    A function, whose state no checkpoint holds, as it would that of an object.

    Args:
        schedule: step -> factor of the learning rate, for a run of `num_steps` steps.
        starts: first step of each stage.
    """

    def factor(step: int) -> float:
        index = bisect_right(starts, step) - 1
        first, end = starts[index], [*starts[1:], num_steps][index]
        return schedule((step - first) * num_steps / max(end - first, 1))

    return factor


def _may_thin(model: nn.Module, layers: Mapping[str, nn.Module], args: NutePruneConfig) -> bool:
    """Return whether hidden dimensions go, where nobody said."""
    if Thinner.refusal(model, layers, None, Budget.parse(args.budget).measure) is not None:
        return False
    stream = Stream.of(model)
    if is_tied(model, stream):  # which method or budget will keep all dimensions is not known yet
        return False
    sizes = legal_hidden_sizes(model, stream, args.round_to)
    try:
        check_thin(model, stream.embedding, sizes[len(sizes) // 2])
    except Unsupported:
        return False
    return True


def _in_vain(model: nn.Module, student: Student) -> list[str]:
    """Say where a head was untied, and no hidden dimension went after all."""
    assert student.gates is not None and student.projected is not None
    stream, untied = student.gates.stream, student.args.untie
    if stream is None or not untied or not bool(student.projected.masks[stream.embedding].all()):
        return []
    num = model.get_submodule(stream.head).get_parameter("weight").numel()
    return [f"no hidden dimension went, and {stream.head} has {num:,} weights of its own: hidden=False keeps it tied"]


def _constant(step: int) -> float:
    return 1.0


def _changing(student: Student) -> dict[str, nn.Module]:
    """Return the layers whose weights settling changes, by their names in the plain model; adapters left out."""
    others: set[str] = set()
    if student.gates is not None:
        others |= {width.name for width in student.gates.widths}
        stream = student.gates.stream
        others |= set() if stream is None else {stream.embedding, *stream.writers}
    found = {}
    for name, module in student.adapted.get_base_model().named_modules():
        if hasattr(module, "get_base_layer"):
            found[name] = module.get_base_layer()
        elif name in others:
            found[name] = module
    return found


def _digest(model: nn.Module) -> str:
    """Return a hash of a few numbers of each parameter: checkpoints hold no weights, and resuming needs the same."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        some = parameter.detach().flatten()[:: max(parameter.numel() // 64, 1)].double().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]
