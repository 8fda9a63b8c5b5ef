"""MaskLLM: learn which N of M weights stay, end to end, while all weights stay as they are (arXiv 2409.17481).

During training each linear layer gives its place to a `DrawnMaskLinear`, which shares its weight and has the logits
that learn; afterwards it comes back, with zeros where the likeliest candidates remove. The noise of a forward is made
from (seed, rank, step, micro-step, layer) alone: no state to save, the same after a resume and in a forward that
gradient checkpointing repeats; processes draw independently, and their gradients are averaged, which only makes more
draws.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from sparsekit.errors import Unsupported
from sparsekit.masks import Mask
from sparsekit.nn import SideLinear, replace_layer_
from sparsekit.nn.side import why_no_branch
from sparsekit.plan import MadeBy, Plan
from sparsekit.prune import installed_versions
from sparsekit.snapshot import restored_on_failure
from sparsekit.targets import find_targets, show_entries, weight_NK
from sparsekit.train.data import IGNORED
from sparsekit.train.distill import distillation_loss
from sparsekit.train.gumbel import Draw, DrawnMaskLinear, initial_logits
from sparsekit.train.maskllm_config import MaskLLMConfig
from sparsekit.train.start import one_shot_, part_for
from sparsekit.train.teachers import Teacher
from sparsekit.train.trainer import SparseTrainer, shifted

PRIOR_FILE = "prior.safetensors"
"""In every checkpoint: the plan that logits leaned to at first, against which changes are counted."""


class MaskLLMTrainer(SparseTrainer):
    """Learns the N:M mask of a causal language model; see `MaskLLMConfig` for what can be chosen.

    `train` returns with zeros in the model where the mask removes; all other weights are bit for bit what they were,
    and so is the whole model where it fails. `plan()` gives the mask. Weights are copied to the CPU twice for a moment,
    each time to go back to: while the one-shot method runs that makes the prior, and when the masks are put in.

    Args:
        model: the dense model.
        args: what to do.
        train_dataset, eval_dataset: text, or tokens; see `sparsekit.train.data.training_samples`.
        processing_class: tokenizer, for text.
        **kwargs: of `transformers.Trainer`.
    Attributes:
        prior: the plan that the logits leaned to at first.
    Raises:
        ValueError: bad arguments or data, or a layer that can take no mask.
        Unsupported: FSDP or DeepSpeed.
    """

    args: MaskLLMConfig

    def __init__(
        self,
        model: nn.Module,
        args: MaskLLMConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        layers = find_targets(model, args.targets, args.ignore)
        _refuse_unmaskable(layers)
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise Unsupported("masks are learnt in layers that stand in for others, which cannot be sharded: use DDP")
        self.layer_names = list(layers)
        self.prior: Plan | None = None
        self.teacher: Teacher | None = None
        self._draw = Draw()
        self._micro_step = 0
        self._masked: dict[str, DrawnMaskLinear] = {}
        self._dense_energy = 0.0
        self._plan: Plan | None = None
        self.add_callback(_Begin(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; as `SparseTrainer.train`. The layers are plain again afterwards, whatever happens."""
        model = self.accelerator.unwrap_model(self.model)
        wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
        places = _places(model, self.layer_names)
        layers = {name: model.get_submodule(name) for name in self.layer_names}
        try:
            result = super().train(*args, **kwargs)
            self._plan = self._plan_of_masks()
        finally:
            self.teacher, self._masked = None, {}
            for name, layer in layers.items():
                layer.train(model.training)
                for place in places[name]:
                    replace_layer_(model, place, layer)
            for parameter, requires_grad in wanted.items():
                parameter.requires_grad_(requires_grad)
        with torch.no_grad(), restored_on_failure(model) as snapshot:
            for name, mask in self._plan.masks.items():
                snapshot.remember(name)
                w_NK = weight_NK(layers[name])
                w_NK.masked_fill_(~mask.keep.to(w_NK.device), 0)
        return result

    # --- before the first step -------------------------------------------------------------------------------------

    def _before_training(self, checkpoint: str | None) -> None:
        """Put logits into the model; a resumed run reads them from its checkpoint later."""
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        layers = {name: model.get_submodule(name) for name in self.layer_names}
        if checkpoint is not None:
            self.prior = Plan.load(Path(checkpoint) / PRIOR_FILE)
        elif isinstance(args.prior, Plan):
            self.prior = part_for(args.prior, layers, args.pattern, "prior")
            self.notes += self.prior.notes
        else:
            with restored_on_failure(model) as snapshot:  # the method's weights are not wanted
                self.prior = one_shot_(self, model, args.prior)
                snapshot.restore()
        model.requires_grad_(False)
        if args.kd_weight > 0:
            self.teacher = Teacher(_twin(model))
        places, generator = _places(model, list(layers)), torch.Generator().manual_seed(args.seed)
        for index, (name, mask) in enumerate(self.prior.masks.items()):
            logits = initial_logits(
                mask.keep,
                args.parsed_pattern,
                lean=args.prior_lean,
                std=args.logit_std,
                generator=generator,
            )
            masked = DrawnMaskLinear(layers[name], logits, args.parsed_pattern, self._draw, index)
            for place in places[name]:
                replace_layer_(model, place, masked)
            self._masked[name] = masked
        self._dense_energy = sum(float(layer.weight.float().square().sum()) for layer in self._masked.values())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        args = self.args
        self.optimizer = torch.optim.AdamW(
            [layer.mask_logits for layer in self._masked.values()],
            lr=args.learning_rate_for(self.state.max_steps),
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            fused=True,
        )
        return self.optimizer

    def what_may_diverge(self) -> str:
        return f"lower learning_rate={self.args.learning_rate_for(self.state.max_steps):.3g}"

    # --- steps -----------------------------------------------------------------------------------------------------

    def begin_training(self) -> None:
        """Prepare what accelerate has wrapped by now."""
        self.without_fp32_copies()

    def begin_step(self) -> None:
        """Set what this optimizer step draws with."""
        args, done = self.args, self._done
        self._draw.kappa = args.kappa_start + (args.kappa_end - args.kappa_start) * done
        self._draw.tau = args.tau_start + (args.tau_end - args.tau_start) * done
        self._micro_step = 0

    @property
    def _done(self) -> float:
        """Share of the steps that lie behind: 0 in the first step, 1 in the last."""
        return self.state.global_step / max(self.state.max_steps - 1, 1)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        args, learns = self.args, model.training
        labels = shifted(inputs["labels"])
        batch = {key: value for key, value in inputs.items() if key != "labels"}
        taught = None
        if learns:
            self._draw.key = (args.seed, args.process_index, self.state.global_step, self._micro_step)
            self._micro_step += 1
            if self.teacher is not None:
                with self.accelerator.autocast():
                    taught = self.teacher.outputs(batch)
        self._draw.keeps_energy = learns
        outputs = model(**batch, use_cache=False)
        self._draw.keeps_energy = False
        loss = distillation_loss(
            outputs.logits,
            taught,
            labels,
            kd_weight=args.kd_weight if learns else 0.0,
            ce_weight=float(args.ce_weight or 0.0) if learns else 1.0,
            temperature=args.temperature,
            kind=args.kd_kind,
            num_items=num_items_in_batch,
        )
        total = loss.total
        if learns:
            # The loss is a share of the step's; the log shows means over this batch's own tokens.
            share = 1.0 if num_items_in_batch is None else (labels != IGNORED).sum() / num_items_in_batch
            energy = self._energy(total)
            parts = {"ce_loss": loss.ce / share, "kept_energy": energy / max(self._dense_energy, 1e-300)}
            self.note_losses(**parts | ({"kd_loss": loss.kd / share} if self.teacher is not None else {}))
            # Its gradient alone: its size says nothing, and it falls away, so that losses would not compare.
            total = total - args.energy_weight * (1 - self._done) * share * (energy - energy.detach())
        if num_items_in_batch is not None and args.average_tokens_across_devices and args.world_size > 1:
            total = total * self.accelerator.num_processes
        return (total, outputs) if return_outputs else total

    def _energy(self, like: Tensor) -> Tensor:
        """Return sum (mask * W)^2 over the layers that the last forward went through."""
        energies = [layer.take_energy() for layer in self._masked.values()]
        on_device = [energy.to(like.device) for energy in energies if energy is not None]
        return torch.stack(on_device).sum() if on_device else like.new_zeros(())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._masked:
            logs |= {"kappa": self._draw.kappa, "tau": self._draw.tau} | self.mask_statistics()
        super().log(logs, start_time)

    def mask_statistics(self) -> dict[str, float]:
        """Return `changed_groups`, the share of groups whose likeliest candidate is not the prior's, and
        `mask_probability`, the mean probability of the likeliest candidate."""
        assert self.prior is not None
        changed, confident, groups = 0.0, 0.0, 0
        m = self.args.parsed_pattern.m
        for name, layer in self._masked.items():
            keep = layer.keep()
            other = keep ^ self.prior.masks[name].to(keep.device).keep
            confidence = layer.confidence(self._draw.kappa)
            padded = nn.functional.pad(other, (0, -other.shape[1] % m))
            changed += float(padded.view(*confidence.shape, m).any(dim=-1).sum())
            confident += float(confidence.double().sum())
            groups += confidence.numel()
        return {"changed_groups": changed / max(groups, 1), "mask_probability": confident / max(groups, 1)}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `Trainer` does; while masks learn, with the prior, for whoever resumes."""
        super().save_model(output_dir, _internal_call)
        if self._masked and self.prior is not None and self.args.should_save:
            self.prior.save(Path(output_dir or self.args.output_dir or ".") / PRIOR_FILE)

    # --- after the last step ---------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """Return the masks, as they are now or as they were at the end of training.

        Raises:
            ValueError: training has not begun.
        """
        if self._masked:
            return self._plan_of_masks()
        if self._plan is None:
            raise ValueError("there is no mask yet: call train() first")
        return self._plan

    def _plan_of_masks(self) -> Plan:
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
            targets=show_entries(args.targets),
            ignore=show_entries(args.ignore),
        )
        masks = {name: Mask(args.pattern, layer.keep().cpu()) for name, layer in self._masked.items()}
        notes = list(self.notes)
        if self.state.global_step < self.state.max_steps:
            notes.append(f"training ended at step {self.state.global_step}, before draws had narrowed to single masks")
        assert self.prior is not None
        return Plan(masks, made_by, notes=notes, perms=self.prior.perms)


class _Begin(TrainerCallback):
    """Tells the trainer that training begins, and each optimizer step."""

    def __init__(self, trainer: MaskLLMTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin_training()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin_step()


def _twin(model: nn.Module) -> nn.Module:
    """Return a copy of the model's modules that has the same tensors."""
    shared: list[Tensor] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _places(model: nn.Module, names: list[str]) -> dict[str, list[str]]:
    """Return all names that the modules of these names have, for one may stand in several places."""
    places: dict[nn.Module, list[str]] = {}
    for place, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(place)
    return {name: places[model.get_submodule(name)] for name in names}


def _refuse_unmaskable(layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        reason = "it has a side branch" if isinstance(layer, SideLinear) else why_no_branch(layer)
        if reason is not None:
            raise ValueError(
                f"{name}, a {type(layer).__name__}, can take no learnt mask: {reason}. Add {name!r} to ignore"
            )
