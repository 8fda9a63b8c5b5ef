"""Side branches that are not packed, in checkpoints: `save_pretrained` keeps them, `from_pretrained` brings them back.

Stock transformers would load the weights, report `side_S` as unexpected, and go on without them.
So while such a model is saved, its config describes them as it does packed layers; in the file each weight beside a
branch is called `side_W`, and one empty tensor has the name of a dense weight, whose shape fits nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn

from sparsekit.nn import SideLinear, replace_layer_, side_layers, sparse_layers
from sparsekit.nn.side import STORED_WEIGHT
from sparsekit.nn.side_columns import SideColumns


def describe_branches(layers: dict[str, SideLinear]) -> dict[str, dict[str, Any]]:
    """Return name -> {shape, source, bias, side}, what a loader needs to build the layers."""
    return {
        name: {
            "shape": [layer.out_features, layer.in_features],
            "source": layer.source,
            "bias": layer.bias is not None,
            "side": SideColumns(layer.in_features, layer.rank, layer.group, layer.side_X is not None).to_dict(),
        }
        for name, layer in layers.items()
    }


def with_stored_names(state: dict[str, Tensor], branches: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """Return a state dict with weights beside branches under the name that they have in a checkpoint."""
    names = {f"{name}.weight": f"{name}.{STORED_WEIGHT}" for name in branches}
    return {names.get(key, key): tensor for key, tensor in state.items()}


class StoredBranch(nn.Module):
    """The parameters of a `SideLinear` by their names in a checkpoint, to be filled.

    Args:
        described: by `describe_branches`.
        weight: of the dense layer in whose place this stands; says where and in which dtype.
    """

    def __init__(self, described: dict[str, Any], weight: Tensor) -> None:
        super().__init__()
        N, K = described["shape"]
        self.columns = SideColumns.from_dict(K, described["side"])
        self.source = str(described["source"])
        rank = self.columns.rank
        shapes: dict[str, tuple[int, ...]] = {STORED_WEIGHT: (N, K), "side_S": (N, rank)}
        shapes |= {"side_X": (rank, K)} if self.columns.has_X else {}
        shapes |= {"bias": (N,)} if described["bias"] else {}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(weight.new_empty(shape), weight.requires_grad))

    @property
    def weight(self) -> nn.Parameter:
        """The weight, for models that look at it while they are built."""
        return self.get_parameter(STORED_WEIGHT)

    def filled(self) -> SideLinear:
        """Return the layer with these very parameters."""
        (N, K), columns = self.weight.shape, self.columns
        rank = columns.rank if columns.has_X else None
        layer = SideLinear(K, N, bias=False, group=columns.group, rank=rank, source=self.source, device="meta")
        for name, parameter in self._parameters.items():
            layer.register_parameter("weight" if name == STORED_WEIGHT else name, parameter)
        return layer.train(self.training)


def install_stored_(model: nn.Module, branches: dict[str, dict[str, Any]]) -> None:
    """Put a `SideLinear` in the place of each `StoredBranch`, which has been filled."""
    for name in branches:
        stored = model.get_submodule(name)
        assert isinstance(stored, StoredBranch)
        replace_layer_(model, name, stored.filled())


def save_branches_(kind: Any) -> None:
    """Let `save_pretrained` of transformers' `PreTrainedModel` keep branches; doing so twice does nothing more."""
    plain = kind.save_pretrained
    if hasattr(plain, "keeps_branches"):
        return

    @wraps(plain)
    def save_pretrained(
        self: Any, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        with _described(self, state_dict):
            return plain(self, save_directory, is_main_process, state_dict, *args, **kwargs)

    save_pretrained.keeps_branches = True  # type: ignore[attr-defined]
    kind.save_pretrained = save_pretrained


@contextmanager
def _described(model: Any, state_dict: dict[str, Tensor] | None) -> Iterator[None]:
    """Describe the branches of a model on it and in its config inside the body; nothing where there are none."""
    layers = side_layers(model)
    if not layers:
        yield
        return
    from sparsekit.hf.describe import describe_layers, layout_version
    from sparsekit.hf.quantizer import SparsekitConfig, SparsekitQuantizer

    other = getattr(model.config, "quantization_config", None)
    if other is not None and not isinstance(other, SparsekitConfig):
        raise ValueError(
            f"{next(iter(layers))} has a side branch, in a model that another quantizer made: sparsekit.pack_(model) "
            "and sparsekit.save keep it, sparsekit.nn.merge_side_(model) folds it into the weight"
        )
    packed, branches = describe_layers(sparse_layers(model)), describe_branches(layers)
    widths, sizes = (other.widths, other.sizes) if other is not None else ({}, {})
    version = layout_version(packed, widths, branches)
    config = SparsekitConfig(packed, version, widths=widths, sizes=sizes, branches=branches)
    quantizer = SparsekitQuantizer(config, pre_quantized=True)
    quantizer.state_dict = state_dict
    places = (vars(model), "hf_quantizer", quantizer), (vars(model.config), "quantization_config", config)
    before = [place.get(name) for place, name, _ in places]
    for place, name, value in places:
        place[name] = value
    try:
        yield
    finally:
        for (place, name, _), value in zip(places, before, strict=True):
            if value is None:
                del place[name]
            else:
                place[name] = value
