"""One model as a student and its numerous teachers (NutePrune, arXiv 2402.09773): its own weights, under the masks and
the LoRA that it had when it was less sparse.

`Roles` puts them on for a forward pass, and `Probe` measures how far the student is from them. A teacher costs its
masks and LoRA in memory, and of the weights only those layers that the student had repaired by then; of all others
there is one copy.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparsekit.errors import Unsupported
from sparsekit.train.adapters import ADAPTER, adapter_layers, lora_parameters
from sparsekit.train.distill import TopK, distillation_loss
from sparsekit.train.snapshots import Snapshot, Snapshots
from sparsekit.train.teacher_schedule import Distances
from sparsekit.train.trainer import from_first_rank


class Roles:
    """Lets one model play its teachers, and be the student afterwards as if nothing had been.

    The student's LoRA is not written to: while another plays, the parameters are given other memory, kept for that. So
    two sets of LoRA are on the device, whatever the number of teachers; and of layers that the student has repaired
    (see `repair_`) its own, the intact ones, and where snapshots teach those of one snapshot.

    Args:
        model: plain or of peft, without wrappers of a trainer (`accelerator.unwrap_model(model)`).
        masked: the `Masked` of this model.
        adapter: name of the adapter that trains; None where masks alone do.
    Raises:
        ValueError: the model has no such adapter.
        Unsupported: its LoRA is sharded.
    """

    def __init__(self, model: nn.Module, masked: Any, adapter: str | None = ADAPTER) -> None:
        self.model, self.masked = model, masked
        self._lora = {} if adapter is None else lora_parameters(model, adapter)
        if any(isinstance(parameter, DTensor) for parameter in self._lora.values()):
            raise Unsupported("the LoRA is sharded over processes: train with DDP, it is small")
        self._intact: dict[str, Tensor] = {}
        self._others: dict[str, Tensor] = {}
        self._worn: Snapshot | None = None
        self._is_playing = False

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def lora(self) -> dict[str, Tensor]:
        """Return name -> tensor of the student's LoRA as it is now, not copied; and of its repaired layers."""
        return {name: parameter.detach() for name, parameter in self._lora.items()}

    def intact(self) -> dict[str, Tensor]:
        """Return name of a repaired parameter -> what it is in the intact model."""
        return dict(self._intact)

    def repair_(self, repaired: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Give the student layers of its own; the intact model keeps what it has, and snapshots theirs.

        Args:
            repaired: name of a layer in the plain model -> its parameters by name. The same layers each time.
        """
        plain: Any = getattr(self.model, "get_base_model", lambda: self.model)()
        names = {id(parameter): name for name, parameter in self.model.named_parameters(remove_duplicate=False)}
        found: dict[str, Tensor] = {}
        for layer, parameters in repaired.items():
            module = plain.get_submodule(layer)
            own = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            found |= {names[id(own.get_parameter(key))]: value for key, value in parameters.items()}
        self.load(found)

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Give the student what `lora` gave, or part of it; a parameter that is no LoRA's becomes its own."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, value in values.items():
            if name not in self._lora:
                self._lora[name] = parameters[name]
                self._intact[name] = parameters[name].data
                parameters[name].data = torch.empty_like(parameters[name].data)
            self._lora[name].data.copy_(value)
        torch.clear_autocast_cache()

    @contextmanager
    def teacher(self, snapshot: Snapshot | None) -> Iterator[nn.Module]:
        """Play a snapshot, or with None the intact model without adapters: eval mode, no gradient.

        Afterwards weights, gradients wanted, modes, masks and random numbers are as before, also where the body fails.

        Raises:
            ValueError: the snapshot is of another model.
        """
        if snapshot is None:
            with self._playing(None), self._without_adapters(), self._with(self._intact):
                yield self.model
            return
        if snapshot.lora.keys() != self._lora.keys():
            odd = sorted(snapshot.lora.keys() ^ self._lora.keys())[0]
            raise ValueError(f"the snapshot has another LoRA than the model, see {odd}: play one of this model")
        masks = {name: mask.to(self.device) for name, mask in snapshot.masks.items()}
        with self._playing(masks), self._wearing(snapshot):
            yield self.model

    @contextmanager
    def student(self, masks: Mapping[str, Tensor] | None) -> Iterator[nn.Module]:
        """Play the student under these masks, with its own LoRA: eval mode, no gradient."""
        with self._playing(masks):
            yield self.model

    @contextmanager
    def _playing(self, masks: Mapping[str, Tensor] | None) -> Iterator[None]:
        if self._is_playing:
            raise RuntimeError("the model plays a role already: leave that one first")
        own, modes = self.masked.masks, [(module, module.training) for module in self.model.modules()]
        with _same_random_numbers(self.model), torch.no_grad():
            self._is_playing = True
            try:
                for module, _ in modes:
                    module.training = False
                self.masked.masks = masks
                yield
            finally:
                self.masked.masks = own
                for module, training in modes:
                    module.training = training
                self._is_playing = False

    @contextmanager
    def _wearing(self, snapshot: Snapshot) -> Iterator[None]:
        """Give the parameters of the LoRA the memory in which the snapshot's is."""
        if snapshot is not self._worn:
            self._worn = None
            for name, parameter in self._lora.items():
                if name not in self._others or self._others[name].device != parameter.device:
                    self._others[name] = torch.empty_like(parameter.detach())
                self._others[name].copy_(snapshot.lora[name], non_blocking=True)
            self._worn = snapshot
        with self._with(self._others):
            yield

    @contextmanager
    def _with(self, others: Mapping[str, Tensor]) -> Iterator[None]:
        """Give parameters this memory for a while."""
        own = {name: self._lora[name].data for name in others}
        try:
            for name, other in others.items():
                self._lora[name].data = other
            torch.clear_autocast_cache()  # which knows a weight by its parameter
            yield
        finally:
            for name, x in own.items():
                self._lora[name].data = x
            torch.clear_autocast_cache()

    @contextmanager
    def _without_adapters(self) -> Iterator[None]:
        """Switch adapters off; peft, which does so by the gradients that they want, is not let have its way there."""
        layers = [layer for layer in adapter_layers(self.model) if not layer.disable_adapters]
        wanted = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for parameter, requires_grad in wanted:
                parameter.requires_grad_(requires_grad)


class Probe:
    """Measures how far a student is from its teachers, on a few held tokens.

    A teacher never changes, so each says what it has to say once; from then on a measurement is one forward pass of
    the student, however many teachers there are.

    Args:
        roles: of the model.
        inputs: a batch as the model takes it, without labels; the same on all ranks.
        top_k: tokens of a teacher's distribution that are kept for each place, the others as one.
    """

    def __init__(self, roles: Roles, inputs: Mapping[str, Tensor], top_k: int = 64) -> None:
        self.roles, self.top_k = roles, top_k
        self.inputs = {key: value.to(roles.device) for key, value in inputs.items() if key != "labels"}
        get_base = getattr(roles.model, "get_base_model", None)
        base: nn.Module = get_base() if callable(get_base) else roles.model
        self._options = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
        self._intact: TopK | None = None
        self._said: dict[int, tuple[float, TopK]] = {}

    def distances(self, snapshots: Snapshots, masks: Mapping[str, Tensor] | None) -> Distances:
        """Return the distance of the student under these masks from the intact model and from each snapshot."""
        if self._intact is None:
            with self.roles.teacher(None) as model:
                self._intact = self._likeliest(model)
        for index, sparsity in enumerate(snapshots.sparsities):
            if index not in self._said or self._said[index][0] != sparsity:
                with self.roles.teacher(snapshots[index]) as model:
                    self._said[index] = sparsity, self._likeliest(model)
        with self.roles.student(masks) as model:
            logits = self._logits(model)
            heard = [self._intact, *(self._said[index][1] for index in range(len(snapshots)))]
            found = torch.stack([self._distance(logits, said) for said in heard])
        intact, *others = from_first_rank(found.double()).tolist()  # all ranks must choose alike
        return Distances(intact, tuple(others))

    def _logits(self, model: nn.Module) -> Tensor:
        """Return logits [tokens, V]; places of padding are left out."""
        logits: Tensor = model(**self.inputs, **self._options).logits
        seen = self.inputs.get("attention_mask")
        return logits.flatten(0, -2) if seen is None else logits[seen.bool()]

    def _likeliest(self, model: nn.Module) -> TopK:
        log_probs = torch.log_softmax(self._logits(model).float(), -1)
        found = log_probs.topk(min(self.top_k, log_probs.shape[-1]))
        return TopK(found.indices.int().cpu(), found.values.cpu())

    @staticmethod
    def _distance(logits: Tensor, said: TopK) -> Tensor:
        labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)  # no matter: ce_weight is 0
        teacher = TopK(said.ids.to(logits.device), said.log_probs.to(logits.device))
        return distillation_loss(logits, teacher, labels, kd_weight=1, ce_weight=0, temperature=1).kd


@contextmanager
def _same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Leave the generators of torch, on the CPU and where the model is, as they are."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    kinds = {device.type for device in devices} or {"cuda"}
    assert len(kinds) == 1, f"one model on {kinds}"
    with torch.random.fork_rng([device.index for device in devices], device_type=kinds.pop()):
        yield
