"""Where a model repeats itself.

Transformers keep their layers in an `nn.ModuleList` (`model.layers`, `encoder.layer`, `transformer.h`); that is all
that is needed to find them, so there is no file per family. Lists inside a block (the experts of a mixture) are part
of the block.
"""

from collections.abc import Collection

from torch import nn


def find_blocks(model: nn.Module, targets: Collection[str]) -> dict[str, list[str]]:
    """Return list name -> names of its blocks, for each outermost list of blocks that holds targets.

    Args:
        model: any `nn.Module`.
        targets: qualified names of the layers of interest.
    Returns:
        Lists and blocks in the order of definition. Blocks without targets are named too, for they still run.
        Empty where nothing is repeated.
    """
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if inside or not _is_block_list(module):
            continue
        blocks = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        if any(target.startswith(f"{block}.") for block in blocks for target in targets):
            found[name] = blocks
    return found


def _is_block_list(module: nn.Module) -> bool:
    children = list(module.children())
    if isinstance(module, nn.ModuleList):
        return any(next(child.children(), None) is not None for child in children)
    if isinstance(module, nn.Sequential):  # of two or more modules of one class, not of bare layers
        same = len({type(child) for child in children}) == 1
        return len(children) > 1 and same and next(children[0].children(), None) is not None
    return False
