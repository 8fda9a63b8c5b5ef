"""Hooks that turn what layers are fed into statistics."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsekit.calibration.samples import Batch
from sparsekit.calibration.statistics import Statistics

_MASKS = ("attention_mask", "decoder_attention_mask")


class Recorder:
    """Gathers one kind of statistics for some layers; use as `with Recorder(…) as recorder:` around the forwards.

    Layers that are fed one and the same tensor (q, k and v; gate and up) share one object: it is the first of them
    that adds. Whether they always are is checked on every call.

    Args:
        layers: the layers, by name.
        kind: the statistics to gather.
        device: where layers without parameters would be; each layer's statistics live where its weight does.
        share: False to give each layer its own, whatever it is fed.
    """

    def __init__(self, layers: dict[str, nn.Module], kind: type[Statistics], device: torch.device, share: bool) -> None:
        self.layers, self.kind, self.device, self.share = layers, kind, device, share
        self._statistics: dict[str, Statistics] = {}
        self._leader: dict[str, str] = {}
        self._calls: Counter[str] = Counter()
        self._last: tuple[Tensor, int, str] | None = None
        self._broken = False
        self._masks: list[Tensor] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "Recorder":
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._last = None

    def begin(self, batch: Batch) -> None:
        """Say which batch comes next: its attention masks tell the tokens from the padding."""
        self._masks = padding_masks(batch)
        self._last = None

    def result(self) -> dict[str, Statistics | None] | None:
        """Return name -> statistics in the order of the first calls, or None if sharing did not hold."""
        uneven = any(self._calls[name] != self._calls[leader] for name, leader in self._leader.items())
        if self._broken or uneven:
            return None
        called: dict[str, Statistics | None] = {
            name: self._statistics[leader] if self._statistics[leader].num_tokens else None
            for name, leader in self._leader.items()
        }
        return called | {name: None for name in self.layers if name not in called}

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            leader = self._leader_of(name, x)
            self._calls[name] += 1
            if leader == name:
                self._statistics[name].add(without_padding(x, self._masks))

        return hook

    def _leader_of(self, name: str, x: Tensor) -> str:
        same_as = self._last[2] if self._last is not None and self.share and _is_same(x, self._last) else None
        if name not in self._leader:
            self._leader[name] = same_as or name
            if same_as is None:
                self._statistics[name] = self.kind(x.shape[-1], x.device)
        elif self._leader[name] != name and same_as != self._leader[name]:
            self._broken = True
        leader = self._leader[name]
        if same_as is None or leader == name:
            self._last = (x, x._version, leader)
        return leader


def padding_masks(batch: Batch) -> list[Tensor]:
    """Return the attention masks [B, T] of a batch in which anything is masked, True = a token."""
    masks = [batch[key].bool() for key in _MASKS if key in batch and batch[key].dim() == 2]
    return [mask for mask in masks if not mask.all()]


def without_padding(x: Tensor, masks: list[Tensor]) -> Tensor:
    """Return the rows of x [..., K] that are no padding, as [M, K]; the first mask of its shape decides."""
    for mask in masks:
        if x.shape[:-1] == mask.shape:
            return x[mask.to(x.device)]
        if x.dim() == 2 and x.shape[0] == mask.numel():
            return x[mask.view(-1).to(x.device)]
    return x.reshape(-1, x.shape[-1])


def _is_same(x: Tensor, last: tuple[Tensor, int, str]) -> bool:
    before, version, _ = last
    return (
        x.data_ptr() == before.data_ptr()
        and x._version == version
        and x.shape == before.shape
        and x.stride() == before.stride()
        and x.dtype == before.dtype
    )
