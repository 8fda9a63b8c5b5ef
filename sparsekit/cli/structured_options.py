"""The options of `sparsekit prune` where parts of a model go, and what of them does not fit together."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsekit.backends import BACKENDS
from sparsekit.budgets import MEASURES
from sparsekit.cli.calibration_file import CalibrationFile
from sparsekit.cli.models import need_writable
from sparsekit.cli.sensitivity_plot import has_matplotlib
from sparsekit.formats import FORMATS
from sparsekit.methods import METHODS, OneShot, StructuredMethod, method_config
from sparsekit.methods.structured import WidthMethod
from sparsekit.patterns import Depth as DepthPattern
from sparsekit.patterns import Pattern, Structured, parse_pattern
from sparsekit.registry import unknown
from sparsekit.sparsify import default_method


@dataclass(frozen=True, kw_only=True)
class StructuredOptions:
    """The options of the command, by their names; None is what was not given.

    Attributes:
        patterns: "structured" or "depth", and maybe one that zeroes weights.
        methods: one for each, or none.
        budget: kind, as in `sparsekit.budgets`, -> amount; None where not given.
        shapes: fields of `WidthMethod` that were given: round_to, tensor_parallel, uniform.
        fields: further fields of the method's config.
    """

    model: str
    out: str
    patterns: tuple[str, ...]
    methods: tuple[str, ...]
    budget: dict[str, Any]
    batch: int | None
    length: int | None
    shapes: dict[str, Any]
    fields: dict[str, Any] = field(default_factory=dict)
    dataset: CalibrationFile | None
    eval_dataset: CalibrationFile | None
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    num_calibration_samples: int | None
    max_seq_length: int
    batch_size: int | None
    format: str
    backend: str
    seed: int
    packed: bool
    dtype: str
    device: str | None
    bench: bool
    bench_batches: tuple[int, ...] | None
    plot: bool | None

    @cached_property
    def config(self) -> StructuredMethod:
        """The structured method, in which budget, shapes and pattern meet.

        Raises:
            ValueError: they do not go together.
        """
        given = {kind: amount for kind, amount in self.budget.items() if amount is not None}
        options = [f"--{kind.replace('_', '-')}" for kind in MEASURES]
        if len(given) != 1:
            asked = " and ".join(f"--{kind.replace('_', '-')} {amount}" for kind, amount in given.items())
            raise ValueError(
                f"{asked + ': these are several budgets.' if given else 'how much shall go?'} Give exactly one of "
                f"{', '.join(options)}, as --flops 60%"
            )
        name = self.methods[0] if self.methods else default_method(self.pattern, self.dataset is not None)
        kind = METHODS.get(name)
        if not issubclass(kind, StructuredMethod):
            structured = [known for known, each in METHODS.items() if issubclass(each, StructuredMethod)]
            raise ValueError(
                f"--method {name} zeroes weights, and --pattern {self.pattern} takes whole parts of a model out: use "
                f"one of {', '.join(structured)}"
            )
        if self.shapes and not issubclass(kind, WidthMethod) and (name != "slicegpt" or {*self.shapes} - {"round_to"}):
            asked = ", ".join(f"--{shape.replace('_', '-')}" for shape in self.shapes)
            raise ValueError(f"{asked}: for methods that take heads and channels out, and --method {name} does not")
        in_time = MEASURES[next(iter(given))] == "ns"
        if self.batch is not None and not in_time:
            raise ValueError(
                f"--batch {self.batch}: for budgets in time, --latency-ms and --speedup; samples at a time are "
                "--batch-size, and what is timed at the end --bench-batches"
            )
        fields = {"sparsity": given["sparsity"]} if "sparsity" in given else {"constraints": given}
        fields |= {"batch": self.batch} if self.batch is not None else {}
        fields |= {"length": self.length} if self.length is not None else {}
        clash = {*fields, *self.shapes, "pattern", "sparsity", "constraints"} & {*self.fields}
        if clash:
            raise ValueError(f"--set {min(clash)}: there is an option for it, or it was given by one; give it once")
        config: StructuredMethod = method_config(
            name, **{"pattern": str(self.pattern), **fields, **self.shapes, **self.fields}
        )
        return config

    @property
    def pattern(self) -> Pattern:
        """What the structured method makes; `--method depth` alone says it, too."""
        pattern = parse_pattern(self.patterns[0])
        is_depth = bool(self.methods) and self.methods[0] == "depth"
        return DepthPattern() if is_depth and isinstance(pattern, Structured) else pattern

    def check(self) -> None:
        """Raise ValueError or FileNotFoundError for what can be seen to be wrong before a model is loaded."""
        shape = "'structured' or 'depth', and then maybe one pattern of zeros, as structured,2:4"
        parsed = [parse_pattern(each) for each in self.patterns]
        if (
            len(parsed) > 2
            or [isinstance(each, Structured | DepthPattern) for each in parsed] != [True, False][: len(parsed)]
        ):
            raise ValueError(f"--pattern {','.join(self.patterns)}: {shape}")
        if len(self.methods) > len(parsed):
            raise ValueError(f"--method {','.join(self.methods)}: one for each pattern of {','.join(self.patterns)}")
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(unknown("method", name, list(METHODS)))
        config = self.config
        if len(parsed) == 2:
            BACKENDS.check(self.backend)
            FORMATS.check(self.format)
            second = method_config(self._second_method, pattern=self.patterns[1])
            if not isinstance(second, OneShot):
                raise ValueError(f"--method {self._second_method} does not make the pattern {self.patterns[1]}")
            if second.statistics is not None and self.dataset is None:
                raise ValueError(f"--method {self._second_method} needs calibration text: pass --dataset FILE")
        for file in (self.dataset, self.eval_dataset):
            if file is not None:
                file.check()
        if config.needs_data and self.dataset is None:
            kind = "labelled rows, as a .tsv of text<tab>label" if config.needs_labels else "unlabelled text"
            raise ValueError(
                f"--method {config.name} needs calibration data ({kind}): pass --dataset FILE, or --method magnitude_sp"
            )
        if self.plot and not has_matplotlib():
            raise ValueError("--plot needs matplotlib: pip install 'sparsekit-torch[train]'")
        if Path(self.model).exists() and Path(self.out).exists() and Path(self.out).samefile(self.model):
            raise ValueError("OUT is MODEL: name another folder, so that the dense weights stay")
        need_writable(self.out, "OUT")

    @property
    def _second_method(self) -> str:
        if len(self.methods) == 2:
            return self.methods[1]
        return default_method(parse_pattern(self.patterns[1]), self.dataset is not None)


def split(words: str | None) -> tuple[str, ...]:
    """Return the words of "structured,2:4", in lower case and with underscores, as methods are registered."""
    return tuple(word.strip().lower().replace("-", "_") for word in (words or "").split(",") if word.strip())


def is_structured(patterns: Sequence[str], methods: Sequence[str]) -> bool:
    """Return whether parts of a model are to go: a pattern says so or, where there is none, the method."""
    if patterns:
        return any(isinstance(parse_pattern(each), Structured | DepthPattern) for each in patterns)
    return bool(methods) and methods[0] in METHODS and issubclass(METHODS.get(methods[0]), StructuredMethod)


def default_pattern(methods: Sequence[str]) -> str:
    """Return the pattern of a structured method."""
    kind = METHODS.get(methods[0])
    assert issubclass(kind, StructuredMethod)
    return str(kind.kind)
