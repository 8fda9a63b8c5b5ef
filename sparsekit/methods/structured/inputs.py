"""What a score may know about the inputs of a reader: a few numbers for each feature."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.calibration.quiet import as_in_inference
from sparsekit.calibration.recorder import padding_masks, without_padding
from sparsekit.calibration.samples import INPUT, Batch
from sparsekit.errors import NonFiniteError


class InputSums:
    """Sums over tokens of each input feature a_k, of its size and of its square; float64, [K].

    Over tokens, and not over batches, so that neither padding nor the size of batches makes a difference.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.num_tokens = 0
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sum, self._size, self._square = torch.zeros(3, in_features, dtype=dtype, device=device).unbind()

    def add(self, a_MK: Tensor) -> None:
        """Take in M tokens."""
        a = a_MK.to(self._sum.dtype)
        self.num_tokens += len(a)
        self._sum += a.sum(dim=0)
        self._size += a.abs().sum(dim=0)
        self._square += a.square().sum(dim=0)

    @property
    def mean(self) -> Tensor:
        """Mean of a_k, [K]."""
        return self._sum / max(self.num_tokens, 1)

    @property
    def mean_abs(self) -> Tensor:
        """Mean of |a_k|, [K]."""
        return self._size / max(self.num_tokens, 1)

    @property
    def rms(self) -> Tensor:
        """Root of the mean square of a_k, [K]."""
        return (self._square / max(self.num_tokens, 1)).sqrt()

    @property
    def variance(self) -> Tensor:
        """Variance of a_k, [K]."""
        return (self.rms.square() - self.mean.square()).clamp_min(0)

    def is_finite(self) -> bool:
        """Return whether no NaN or infinity came in."""
        return bool(self._square.isfinite().all())


def run(model: nn.Module, batch: Batch) -> Any:
    """Return what the model gives for a batch, on the device of its weights."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    inputs = {key: value.to(device) for key, value in batch.items()}
    return model(inputs.pop(INPUT), **inputs) if INPUT in inputs else model(**inputs)


def check_tokens(batches: list[Batch], tokenizer: Any = None) -> None:
    """Raise ValueError if batches of tokens hold nothing but padding and what the tokenizer calls special, as the token
    of unknown words."""
    special = torch.tensor(sorted(getattr(tokenizer, "all_special_ids", None) or ()), dtype=torch.long)
    for batch in batches:
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if ids is None:
            return
        real = ids[mask != 0] if mask is not None and mask.shape == ids.shape else ids.flatten()
        if not bool(torch.isin(real.cpu(), special).all()):
            return
    if batches:
        kinds = "padding, an unknown word or another special token" if len(special) else "padding"
        raise ValueError(f"no token of the calibration data is more than {kinds}: pass text that the model can use")


def mean_length(model: nn.Module, reader: str, batches: list[Batch]) -> float | None:
    """Return the mean number of tokens of a sequence, padding apart; None without data.

    Where inputs are no tokens, it is that of the rows that a layer, `reader`, is fed for each sample, as patches.
    """
    if not batches:
        return None
    rows = sum(len(next(iter(batch.values()))) for batch in batches)
    if "input_ids" in batches[0]:
        masks = (batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches)
        return sum(int(mask.sum()) for mask in masks) / rows
    seen: list[int] = []
    handle = model.get_submodule(reader).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[:-1].numel())
    )
    try:
        with as_in_inference(model):
            run(model, batches[0])
    finally:
        handle.remove()
    return sum(seen) / len(next(iter(batches[0].values()))) if seen else None


def input_sums(model: nn.Module, readers: Iterable[str], batches: Iterable[Batch]) -> dict[str, InputSums]:
    """Return the sums of what some layers are fed in one pass over the data.

    Raises:
        NonFiniteError: a layer was fed NaN or infinity.
        ValueError: a layer saw no token.
    """
    found: dict[str, InputSums] = {}
    masks: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(as_in_inference(model))
        for name in readers:

            def see(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                sums = found.setdefault(name, InputSums(args[0].shape[-1], args[0].device))
                sums.add(without_padding(args[0], masks))

            stack.callback(model.get_submodule(name).register_forward_pre_hook(see).remove)
        for batch in batches:
            masks = padding_masks(batch)
            run(model, batch)
    for name in readers:
        check_inputs(name, found[name].num_tokens if name in found else 0, name not in found or found[name].is_finite())
    return found


def check_inputs(name: str, num_tokens: float, is_finite: bool) -> None:
    """Raise unless a layer saw tokens, and numbers in them.

    Raises:
        NonFiniteError: it was fed NaN or infinity.
        ValueError: it saw no token.
    """
    if not num_tokens:
        raise ValueError(f"no token of the calibration data reached {name}: pass text that the model can use")
    if not is_finite:
        raise NonFiniteError(
            f"the inputs of {name} hold NaN or infinity on the calibration data: check the model's weights, and that "
            "its dtype can hold its activations (bfloat16 where float16 overflows)"
        )
