"""The drop-in: prune, make it true, pack, check."""

import warnings
from typing import Any

import torch.nn as nn

from sparsekit.backends import BACKENDS
from sparsekit.check import check
from sparsekit.errors import SparsekitError
from sparsekit.formats import FORMATS
from sparsekit.pack import pack_
from sparsekit.patterns import Pattern, parse_pattern
from sparsekit.prune import prune_
from sparsekit.snapshot import restored_on_failure
from sparsekit.surgery import apply_
from sparsekit.targets import find_targets


def sparsify(
    model: nn.Module,
    pattern: str | Pattern = "2:4",
    *,
    method: Any = None,
    dataset: Any = None,
    tokenizer: Any = None,
    sparsity: float = 0.5,
    constraints: dict[str, Any] | None = None,
    targets: Any = ("Linear",),
    ignore: Any = ("lm_head",),
    num_calibration_samples: int = 128,
    max_seq_length: int = 2048,
    batch_size: int = 1,
    format: str = "auto",
    backend: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Prune a trained model, pack it, check it, and return the same model object, ready to run.

    Args:
        model: any module made of `nn.Linear` (or GPT-2's `Conv1D`).
        pattern: "2:4", any "N:M", "64x64" (blocks) or "unstructured". Only 2:4 (and what is sparser in the same
            groups, as "1:4") has a packed format; weights of the other patterns stay dense, with zeros, and
            `sparsekit.check` says so.
        method: "magnitude", "wanda", "sparsegpt", or a config object such as `sparsekit.SparseGPT(...)`, which then
            also names the pattern. None: SparseGPT when there is a dataset, magnitude when there is none.
        dataset: calibration data: strings, token tensors, a `datasets.Dataset`, a DataLoader, or a path to
            .txt/.jsonl/.parquet.
        tokenizer: turns strings into tokens.
        sparsity: share of the weights removed, for patterns that do not fix it.
        constraints: a budget instead of a sparsity; no one-shot method takes one.
        targets, ignore: class names, "re:..." on the qualified name, names, or a callable `(module, name) -> bool`.
        num_calibration_samples, max_seq_length, batch_size: how much of the dataset is used, and how.
        format: of the packed weights; "auto" packs what fits.
        backend: who runs the packed weights; "auto" for the best here.
        seed: of every random choice. Equal seeds give equal bits.
        progress: show progress bars.
    Raises:
        ValueError: a bad argument, by name.
        NonFiniteError: NaN or infinity in weights or activations, by layer.
        SparsekitError: what came out is not what was asked for.

    Whatever is raised, Ctrl-C included, the model is as it was before. For this one copy of the target weights is
    kept in host memory while pruning runs.
    """
    wanted = parse_pattern(pattern)
    if constraints is not None:
        raise ValueError(f"constraints={constraints!r}: one-shot methods take no budget; leave it out and set sparsity")
    _check_names(format, backend)
    config = choose_method(method, wanted, sparsity, has_data=dataset is not None)
    with restored_on_failure(model):
        layers = find_targets(model, targets, ignore)
        if method is None and already_obeys(layers, wanted):
            pack_(model, format, backend, progress=progress)
        else:
            plan = prune_(
                model,
                config,
                dataset=dataset,
                tokenizer=tokenizer,
                targets=targets,
                ignore=ignore,
                num_calibration_samples=num_calibration_samples,
                max_seq_length=max_seq_length,
                batch_size=batch_size,
                seed=seed,
                progress=progress,
            )
            apply_(model, plan)
            for note in plan.notes:
                warnings.warn(note, stacklevel=2)
            if has_packed_format(config.pattern):
                pack_(model, format, backend, progress=progress)
        report = check(model)
        if not report.ok:
            raise SparsekitError(f"the result does not hold what was asked for:\n{report}")
    return model
