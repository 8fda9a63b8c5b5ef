"""The README that goes into every checkpoint folder."""

import math
from pathlib import Path

import torch.nn as nn
from torch import Tensor

from sparsekit.formats import FORMATS, WeightSpec
from sparsekit.hf.describe import widths_of
from sparsekit.nn import SparseLinear, linear_size, side_layers

_PACKED = """\
## How to load

```python
import sparsekit  # first: it teaches transformers to read packed weights
from transformers import {auto_class}

model = {auto_class}.from_pretrained("this folder")
```

or `sparsekit.load("this folder")`, which also checks the files against the digests in `sparsekit.json`.

**Without `import sparsekit` the load fails**, and must: transformers says "Unknown quantization type, got sparsekit",
and then that the size of `{tripwire}` does not match (it is an empty tensor, put there so that nobody runs a model
with random weights by mistake). Install the package with `pip install sparsekit-torch`, or ask the author for the dense
form: `sparsekit.save(model, folder, packed=False)` writes one that opens anywhere.

## Size

{num_layers} layers are packed ({patterns}, as {formats}):
{packed_mb:.1f} MB instead of {dense_mb:.1f} MB dense ({share:.3f} of the bytes), {bits:.3g} bits for each dense weight.
{branches}"""

_BRANCHES = """\
{num_branches} of them have a low-rank side branch, which these numbers count.
"""

_CUT = """\
## How to load

```python
import sparsekit  # first: it teaches transformers the sizes of these layers
from transformers import {auto_class}

model = {auto_class}.from_pretrained("this folder")
```

or `sparsekit.load("this folder")`, which also checks the files against the digests in `sparsekit.json`.

The model is dense and smaller: heads or channels were cut from its blocks. {num_layers} of its layers have sizes that
`config.json` has no words for, as `{first}` with {out_features} x {in_features}; they stand there under
`quantization_config`, `widths`. **Without `import sparsekit` the load fails**, with sizes that do not match: never pass
`ignore_mismatched_sizes`, which would put random weights there. Install the package with `pip install sparsekit-torch`.
"""

_BESIDE = """\
## How to load

```python
import sparsekit  # first: it teaches transformers the branches
from transformers import {auto_class}

model = {auto_class}.from_pretrained("this folder")
```

or `sparsekit.load("this folder")`.

The weights are dense, and {num_layers} layers have a low-rank branch beside theirs, as `{first}`. **Without
`import sparsekit` the load fails**, and must: the model is not the same without its branches. Install the package with
`pip install sparsekit-torch`. `sparsekit.merge_side_(model)` folds them into the weights.
"""

_DENSE = """\
## How to load

These are ordinary dense weights, and the config says their sizes: any tool that opens the base model opens this one.
"""

_ZEROS = """\
To run its 2:4 zeros packed and faster: `sparsekit.pack_(model)` after loading.
"""


def stored_bytes(layer: SparseLinear) -> int:
    """Return the bytes of a layer's weight in a checkpoint, with its side branch."""
    parts = FORMATS.get(layer.format).parts(layer.spec).values()
    beside = sum(tensor.nbytes for tensor in layer.side_tensors().values())
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts) + beside


def pattern_of(spec: WeightSpec) -> str:
    """Return the pattern of a weight of this spec, as "2:4" or "64x64"."""
    return "2:4" if spec.block is None else f"{spec.block[0]}x{spec.block[1]}"


def write_card(model: nn.Module, folder: Path, packed: dict[str, SparseLinear]) -> None:
    """Write README.md into a checkpoint folder."""
    base_model = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    patterns = sorted({pattern_of(layer.spec) for layer in packed.values()})
    tags = ["sparse", "pruned", "sparsekit", *patterns]
    front = ["---", "tags:", *(f"- {tag!r}" if ":" in tag else f"- {tag}" for tag in tags)]
    if base_model and not Path(base_model).exists():
        front += [f"base_model: {base_model}"]
    front += ["---", "", f"# {type(model).__name__}, pruned with sparsekit", ""]
    if packed:
        dense = sum(layer.dense_bytes() for layer in packed.values())
        stored = sum(stored_bytes(layer) for layer in packed.values())
        num_branches = sum(layer.side is not None for layer in packed.values())
        body = _PACKED.format(
            auto_class=_auto_class(model),
            tripwire=f"{min(packed)}.weight",
            num_layers=len(packed),
            patterns=", ".join(patterns),
            formats=", ".join(sorted({layer.format for layer in packed.values()})),
            bits=8 * stored / sum(layer.in_features * layer.out_features for layer in packed.values()),
            packed_mb=stored / 1e6,
            dense_mb=dense / 1e6,
            share=stored / max(dense, 1),
            branches=_BRANCHES.format(num_branches=num_branches) if num_branches else "",
        )
    elif branches := side_layers(model):
        body = _BESIDE.format(auto_class=_auto_class(model), num_layers=len(branches), first=next(iter(branches)))
    elif widths := widths_of(model):
        first = next(iter(widths))
        body = _CUT.format(
            auto_class=_auto_class(model),
            num_layers=len(widths),
            first=first,
            out_features=widths[first][0],
            in_features=widths[first][1],
        )
    else:
        body = _DENSE + (_ZEROS if _has_zeros(model) else "")
    (folder / "README.md").write_text("\n".join(front) + "\n" + body)


def _has_zeros(model: nn.Module) -> bool:
    """Return whether a tenth or more of the weights of some linear layer are zero."""
    return any(
        float((weight == 0).float().mean()) >= 0.1
        for module in model.modules()
        if linear_size(module) is not None and isinstance(weight := module.weight, Tensor) and weight.numel()
    )


def _auto_class(model: nn.Module) -> str:
    name = type(model).__name__
    for suffix, auto_class in (
        ("ForCausalLM", "AutoModelForCausalLM"),
        ("LMHeadModel", "AutoModelForCausalLM"),
        ("ForSequenceClassification", "AutoModelForSequenceClassification"),
        ("ForMaskedLM", "AutoModelForMaskedLM"),
    ):
        if name.endswith(suffix):
            return auto_class
    return "AutoModel"
