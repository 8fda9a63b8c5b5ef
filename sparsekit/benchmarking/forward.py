"""One forward of whole models, on inputs of a given size; what width and depth make of it."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from sparsekit.archs import max_positions, vocabulary_size
from sparsekit.benchmarking.machine import device_of
from sparsekit.benchmarking.models import is_causal
from sparsekit.benchmarking.timing import Comparison, compare
from sparsekit.calibration.quiet import as_in_inference

ROUNDS = 30
"""Timed calls of each variant; fewer where they take long."""


def time_forward(
    models: Mapping[str, nn.Module],
    *,
    batch_size: int = 1,
    length: int = 128,
    inputs: Mapping[str, Any] | None = None,
    max_seconds: float = 10.0,
) -> Comparison:
    """Return the timings of one forward of each model, all on the same inputs and taking turns.

    Args:
        models: name -> model; all on one device.
        batch_size, length, inputs: as in `example_inputs`.
        max_seconds: how long it may take, but for three rounds.
    """
    first = next(iter(models.values()))
    given = example_inputs(first, batch_size, length) if inputs is None else inputs
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(as_timed(model))
        calls = {name: lambda model=model: model(**given) for name, model in models.items()}
        return compare(calls, rounds=ROUNDS, max_seconds=max_seconds, device=device_of(first))


def example_inputs(model: nn.Module, batch_size: int, length: int) -> dict[str, Any]:
    """Return keyword arguments of the model's forward: random tokens [batch_size, length], or images of its size.

    A causal language model answers for the last token only, as when it reads a prompt.

    Raises:
        ValueError: a size is out of range, or the model reads something else.
    """
    if batch_size < 1 or length < 1:
        raise ValueError(f"{batch_size=}, {length=}: both are numbers of at least 1")
    generator, device = torch.Generator().manual_seed(0), device_of(model)
    config: Any = getattr(model, "config", None)
    if getattr(model, "main_input_name", "") == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        images = torch.randn(batch_size, config.num_channels, height, width, generator=generator)
        return {"pixel_values": images.to(device, next(model.parameters()).dtype)}
    vocabulary, limit = vocabulary_size(model), max_positions(model)
    if vocabulary is None:
        raise ValueError(f"{type(model).__name__} reads neither tokens nor images: pass inputs=, as its forward wants")
    if limit is not None and length > limit:
        raise ValueError(f"length={length} is more than the {limit} positions of {type(model).__name__}: use fewer")
    ids = torch.randint(vocabulary, (batch_size, length), generator=generator).to(device)
    takes = inspect.signature(model.forward).parameters
    more: dict[str, Any] = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    if "logits_to_keep" in takes and is_causal(model):
        more["logits_to_keep"] = 1
    return {"input_ids": ids} | more


@contextmanager
def as_timed(model: nn.Module) -> Iterator[None]:
    """Hold the model in eval mode, without cache and gradients, at the precision of matmuls that the user has set."""
    precision = torch.get_float32_matmul_precision()
    with as_in_inference(model):
        torch.set_float32_matmul_precision(precision)
        yield
