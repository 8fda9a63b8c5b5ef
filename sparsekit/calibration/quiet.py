"""A model held still while it is watched."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def as_in_inference(model: nn.Module) -> Iterator[None]:
    """Hold the model in eval mode, without cache, gradients and autocast, in full fp32 matmuls; then put all back.

    The state of torch's global generators is the same afterwards, also if the model draws from them.
    """
    devices = {parameter.device for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    caches = [
        (config, config.use_cache)
        for config in configs.values()
        if isinstance(getattr(config, "use_cache", None), bool)
    ]
    precision = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.callback(_restore_modes, modes)
        for config, value in caches:
            stack.callback(setattr, config, "use_cache", value)
        stack.callback(torch.set_float32_matmul_precision, precision)
        stack.enter_context(
            torch.random.fork_rng(devices=[device.index for device in devices if device.type == "cuda"])
        )
        torch.default_generator.manual_seed(0)
        for kind in {device.type for device in devices}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.no_grad())
        model.eval()
        for config, _ in caches:
            config.use_cache = False
        torch.set_float32_matmul_precision("highest")
        yield


def _restore_modes(modes: dict[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training
