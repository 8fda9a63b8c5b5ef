"""LoRA through peft, as pruning trains it: put on, and at the end merged into the weights or kept as side branches.

peft's own merge rounds the product to the weight's dtype before it adds it, and the sum again; here both happen in
fp32, and the sum is rounded once.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsekit.archs import find_blocks, find_widths
from sparsekit.errors import NonFiniteError, Unsupported
from sparsekit.nn import SideLinear, SparseLinear, install_side_
from sparsekit.plan import Plan, SideBranch
from sparsekit.targets import find_targets, is_conv1d, is_linear, set_weight_NK_, weight_NK

ADAPTER = "default"
"""Name of the adapter that `add_lora` makes."""

_MERGED_IN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_WANTED = "_sparsekit_required_grad"
"""On the model with LoRA: names of the parameters of the plain one that required a gradient."""


class LoraArguments(Protocol):
    """What `add_lora` reads of a config.

    Attributes:
        lora_rank: r.
        lora_alpha: what the branch adds is multiplied by lora_alpha / lora_rank.
        lora_targets: "all-linear" for all linear layers inside blocks, or entries as of `targets` (a name, its last
            segment, "re:…"), as ["q_proj", "v_proj"].
        seed: of the factors' first values.
    """

    lora_rank: int
    lora_alpha: float
    lora_targets: str | Sequence[str]
    seed: int


def add_lora(model: nn.Module, args: LoraArguments) -> Any:
    """Return a `PeftModel` around the model, whose LoRA alone trains, in fp32; it adds nothing yet.

    Raises:
        ValueError: the model has adapters already or is quantised or packed, or an argument does not fit it.
        Unsupported: peft is not installed.
    """
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as error:
        raise Unsupported("lora_rank: LoRA needs peft, which is not installed: pip install 'peft>=0.18'") from error
    if args.lora_rank < 1:
        raise ValueError(f"lora_rank={args.lora_rank} must be a whole number of at least 1, as 16")
    if not 0 < args.lora_alpha < float("inf"):
        raise ValueError(f"lora_alpha={args.lora_alpha} must be above 0, as lora_rank={args.lora_rank}")
    check_takes_lora(model)
    layers = _layers(model, args.lora_targets)
    wanted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        bias="none",
        target_modules=list(layers),
        fan_in_fan_out=all(is_conv1d(layer) for layer in layers.values()),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.default_generator.manual_seed(args.seed)  # peft makes the factors on the CPU
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # where a model has layers of both kinds
        adapted = get_peft_model(model, config, ADAPTER)
    vars(adapted)[_WANTED] = wanted
    return adapted


def adapter_layers(model: nn.Module) -> list[Any]:
    """Return peft's layers of a model, none where peft has not been loaded."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return []
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def lora_parameters(model: nn.Module, adapter: str = ADAPTER) -> dict[str, nn.Parameter]:
    """Return qualified name -> parameter of one adapter's LoRA.

    Raises:
        ValueError: there is none.
    """
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if adapter in (segments := name.split(".")) and any(segment.startswith("lora_") for segment in segments)
    }
    if not found:
        raise ValueError(
            f"the model has no LoRA named {adapter!r}: add_lora puts one on; or leave it out, adapter=None"
        )
    return found


def merge_(model: Any) -> nn.Module:
    """Return the model that `add_lora` got, the same object, with the LoRA in its weights.

    The sum is made in fp32 and rounded once. Parameters are the same objects, and require a gradient where they did.

    Raises:
        ValueError: this is no model with LoRA.
        NonFiniteError: the LoRA holds NaN or infinity. Nothing was changed.
    """
    factors = factors_of(model)
    plain = _taken_off(model)
    for name, (B, A) in factors.items():
        layer = plain.get_submodule(name)
        set_weight_NK_(layer, torch.addmm(weight_NK(layer).to(B.dtype), B, A))
    return plain


def as_side_(model: Any, plan: Plan) -> nn.Module:
    """Return the model that `add_lora` got, the same object, with the LoRA as side branches (`SideLinear`).

    Shapes stay full; `apply_(model, plan)` cuts weights and branches alike. Columns of what the plan cuts are zeroed in
    the weight and in the branch of the layer that reads them.

    Raises:
        ValueError: this is no model with LoRA, or the plan is of another one.
        Unsupported: the plan cuts hidden dimensions, which branches cannot follow.
        NonFiniteError: the LoRA holds NaN or infinity. Nothing was changed.
    """
    if any(cut.kind == "hidden" for cut in plan.cuts.values()):
        raise Unsupported("hidden dimensions cannot be cut beside side branches: merge the LoRA, merge_lora=True")
    factors, wrappers = factors_of(model), _wrappers(model)
    plain = _taken_off(model)
    try:
        dead = _dead_columns(plain, plan)
    except BaseException:
        _put_back(model, wrappers)
        raise
    for name, (B, A) in factors.items():
        install_side_(plain, name, SideBranch(B, A))
    for name, columns in dead.items():
        layer = plain.get_submodule(name)
        beside = [layer.side_X] if isinstance(layer, SideLinear) and layer.side_X is not None else []
        for x in (weight_NK(layer), *beside):
            x.detach()[:, columns.to(x.device)] = 0
    return plain


def check_takes_lora(model: nn.Module) -> None:
    """Raise where LoRA cannot be put on, or not be merged in the end."""
    if adapter_layers(model) or hasattr(model, "get_base_model"):
        names = sorted(getattr(model, "peft_config", {})) or ["of unknown name"]
        raise ValueError(
            f"the model has adapters already ({', '.join(names)}): fold them in, model = model.merge_and_unload(), or "
            "take them off, model = model.unload(), before it gets LoRA of lora_rank"
        )
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            raise ValueError(f"{name} is packed, and LoRA cannot be merged into it: call unpack_(model) first")
        weight = module._parameters.get("weight")
        is_quantised = isinstance(module, nn.Linear) and weight is not None and weight.dtype not in _MERGED_IN
        if is_quantised or hasattr(module, "qweight"):
            raise ValueError(
                f"{name} is quantised ({type(module).__name__}), and LoRA cannot be merged into it: load the model in "
                "bfloat16, and quantise what comes out"
            )


def _layers(model: nn.Module, lora_targets: str | Sequence[str]) -> dict[str, nn.Module]:
    """Return name -> layer that gets LoRA; all are inside of blocks, so that all teachers have one output head."""
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    blocks = tuple(f"{block}." for names in find_blocks(model, linears).values() for block in names)
    if not blocks:
        raise Unsupported(f"{type(model).__name__} has no list of blocks (an nn.ModuleList) to put LoRA into")
    everything = lora_targets == "all-linear"
    try:
        found = find_targets(model, ("Linear",) if everything else lora_targets, ignore=())
    except ValueError as error:
        raise ValueError(f"lora_targets: {error}") from None
    outside = [name for name in found if not name.startswith(blocks)]
    if outside and not everything:
        raise ValueError(
            f"lora_targets: {outside[0]} is outside of the blocks, where all teachers are one: leave it out"
        )
    return {name: layer for name, layer in found.items() if name not in outside}


def factors_of(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Return name of the layer in the plain model -> B [N, r] with its scale, A [r, K]; in fp32 or more."""
    config = getattr(model, "peft_config", {}).get(ADAPTER)
    if config is None:
        raise ValueError(f"{type(model).__name__} has no LoRA named {ADAPTER!r}: pass what add_lora returned")
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in _wrappers(model).items():
        if layer.merged:
            raise ValueError(f"the LoRA of {name} is merged already: call model.unmerge_adapter() first")
        dtype = torch.promote_types(layer.get_base_layer().weight.dtype, torch.float32)
        B = layer.lora_B[ADAPTER].weight.detach().to(dtype) * layer.scaling[ADAPTER]
        A = layer.lora_A[ADAPTER].weight.detach().to(dtype)
        if not bool(B.isfinite().all() & A.isfinite().all()):
            raise NonFiniteError(f"the LoRA of {name} holds NaN or infinity: go back to a sound checkpoint")
        found[name] = B, A
    return found


@torch.no_grad()
def reset_(model: Any, names: Iterable[str]) -> None:
    """Let the LoRA of these layers add nothing again; layers without are left out."""
    wrappers = _wrappers(model)
    for name in names:
        if name in wrappers:
            wrappers[name].lora_B[ADAPTER].weight.zero_()


@contextmanager
def without_adapters(model: Any) -> Iterator[nn.Module]:
    """Yield the plain model that `add_lora` got, its own layers in their places; afterwards the LoRA is back on."""
    wrappers = _wrappers(model)
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield _taken_off(model)
    finally:
        _put_back(model, wrappers)
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


def _wrappers(model: Any) -> dict[str, Any]:
    """Return name in the plain model -> peft's layer in its place."""
    ours = {id(layer) for layer in adapter_layers(model)}
    return {name: module for name, module in model.get_base_model().named_modules() if id(module) in ours}


def _taken_off(model: Any) -> nn.Module:
    """Return the plain model, its own layers in their places, as `unload` of peft does, but without a progress bar."""
    plain: nn.Module = model.get_base_model()
    for name, layer in _wrappers(model).items():
        parent, _, attribute = name.rpartition(".")
        plain.get_submodule(parent)._modules[attribute] = layer.get_base_layer()
    vars(plain).pop("peft_config", None)  # by which other tools know a model that has adapters
    wanted = set(vars(model).get(_WANTED, ()))
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in wanted)
    return plain


def _put_back(model: Any, wrappers: dict[str, Any]) -> None:
    """Undo `_taken_off`."""
    plain = model.get_base_model()
    plain.requires_grad_(False)
    plain.peft_config = model.peft_config
    for name, layer in wrappers.items():
        parent, _, attribute = name.rpartition(".")
        plain.get_submodule(parent)._modules[attribute] = layer


def _dead_columns(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Return name of a layer -> its columns that read what the plan cuts; names as before layers went."""
    layers = {name: cut.kept.tolist() for name, cut in plan.cuts.items() if cut.kind == "layers"}

    def in_full(name: str) -> str:
        for blocks, kept in layers.items():
            if name.startswith(f"{blocks}."):
                place, dot, rest = name.removeprefix(f"{blocks}.").partition(".")
                return f"{blocks}.{kept[int(place)]}{dot}{rest}"
        return name

    cuts = {in_full(name): cut for name, cut in plan.cuts.items() if cut.kind in ("heads", "channels")}
    widths = {width.name: width for width in find_widths(model)} if cuts else {}
    for name, cut in cuts.items():
        if name not in widths or (widths[name].kind, widths[name].num_units) != (cut.kind, cut.num):
            raise ValueError(f"the plan does not fit this model: it cuts {cut.num} {cut.kind} that {name} reads")
    return {name: widths[name].columns_of(cut.removed) for name, cut in cuts.items()}
