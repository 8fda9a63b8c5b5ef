"""Rounding onto the grids of the quantised formats, against their numbers written out one by one."""

import pytest
import torch

from sparsekit.formats import FORMATS
from sparsekit.methods import METHODS, OneShot
from sparsekit.methods.base import Decision
from sparsekit.methods.grid import Grid, refit_, round_to_nearest, scale_spans, stored_scales
from sparsekit.patterns import NM

FORMAT_NAMES = ["semi24_int8", "semi24_int4", "semi24_fp8"]


def numbers_of(format):
    """All q that a format stores, in order."""
    if format == "semi24_fp8":
        codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        return codes[codes.isfinite()].unique()
    end = 127 if format == "semi24_int8" else 7
    return torch.arange(-end, end + 1).double()


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_nearest_is_nearest(format):
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(5, generator=generator) + 0.01
    grid = Grid.of(format, scales)
    w = torch.randn(64, 5, generator=generator) * grid.scales * numbers_of(format).max() / 2
    w[0], w[1] = 0, -0.0
    w[2] = 3 * numbers_of(format).max() * grid.scales  # beyond the end
    got = grid.nearest(w)
    all_q = numbers_of(format) * grid.scales.double()[:, None]
    distance = (w.double()[..., None] - all_q).abs()
    assert ((got.double() - w.double()).abs() <= distance.min(dim=-1).values + 1e-6 * w.double().abs()).all()
    assert torch.equal(got, grid.numbers(w) * grid.scales)
    assert not bool((got.signbit() & (got == 0)).any())
    assert torch.equal(grid.nearest(got), got)


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_ties_go_to_even(format):
    grid = Grid.of(format, torch.ones(1))
    assert grid.nearest(torch.tensor([[0.5], [1.5], [2.5], [-0.5]])).flatten().tolist() == (
        [0, 2, 2, 0] if format != "semi24_fp8" else [0.5, 1.5, 2.5, -0.5]
    )


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_fitted_is_the_best_of_the_shares(format):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(40, 6, generator=generator)
    w[3] *= 10  # an outlier, where errors cost little
    w[:, 5] = 0
    costs = torch.rand(40, generator=generator)
    costs[3] = 1e-3
    widest = Grid.around(format, w)
    fitted = Grid.fitted(format, w, costs)

    def cost(grid):
        return ((grid.nearest(w) - w).double().square() * costs[:, None].double()).sum(dim=0)

    tried = torch.stack([cost(Grid.of(format, widest.scales * tenths / 10)) for tenths in range(4, 11)])
    assert torch.allclose(cost(fitted), tried.min(dim=0).values, rtol=1e-5)
    assert fitted.scales[5] == 1
    if format == "semi24_int4":
        assert bool((fitted.scales[:5] < 0.95 * widest.scales[:5]).all())


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-45, float("nan")])
def test_scales_that_no_format_stores_become_one(format, scale):
    scales = Grid.of(format, torch.tensor([scale, 0.5])).scales
    assert bool((scales > 0).all()) and scales[1] == 0.5


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N,K", [(1, 1), (3, 7), (5, 128), (4, 130), (7, 300)])
def test_round_to_nearest_is_what_packing_gives(format, dtype, N, K):
    generator = torch.Generator().manual_seed(K)
    w = torch.randn(N, K, generator=generator).to(dtype)
    keep = NM(2, 4).project(torch.rand(N, K, generator=generator))
    rounded, scales = round_to_nearest(w.float(), keep, format)
    kind = FORMATS.get(format)
    alone = kind.pack(w * keep)
    assert torch.equal(scales, alone.tensors["scales"])
    assert torch.equal(rounded.to(dtype), kind.unpack(alone))
    again = kind.pack(rounded.to(dtype), scales)
    assert torch.equal(kind.unpack(again), rounded.to(dtype))


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_decisions_without_scales_are_rounded_and_those_of_updating_methods_say_so(name):
    w = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    keep = NM(2, 4).project(w.abs())
    config = METHODS.get(name)(format="semi24_int8")
    decision = config.rounded(w, Decision(keep, notes=("fell back",)))
    weight, scales = round_to_nearest(w, keep, "semi24_int8")
    assert torch.equal(decision.weight, weight) and torch.equal(decision.scales, scales)
    rest = ("its weights were rounded to nearest, without compensation",) if name == "sparsegpt" else ()
    assert decision.notes == ("fell back", *rest)
    assert config.rounded(w, decision) is decision
    plain = Decision(keep)
    assert METHODS.get(name)().rounded(w, plain) is plain
    assert METHODS.get(name)(format="semi24").rounded(w, plain) is plain


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_refit_is_the_least_squares_answer(format):
    generator = torch.Generator().manual_seed(1)
    K, N = 300, 6
    x = torch.randn(500, K, generator=generator) @ (torch.randn(K, K, generator=generator) / K**0.5 + torch.eye(K))
    original = torch.randn(K, N, generator=generator)
    w = original * NM(2, 4).project(original.T.abs()).T
    w[:, 0] = 0  # nothing to scale
    spans = scale_spans(format, K)
    grids = [Grid.around(format, w[span]) for span in spans]
    w = torch.cat([grid.nearest(w[span]) for grid, span in zip(grids, spans, strict=True)])
    before, H = w.clone(), x.T @ x
    new = refit_(w, grids, original, H)
    for n in range(1, N):
        terms = torch.stack([x.double()[:, span] @ before[span, n].double() for span in spans], dim=1)
        best = torch.linalg.lstsq(terms, (x.double() @ original[:, n].double())[:, None]).solution.flatten()
        got = torch.stack([grid.scales[n] / old.scales[n] for grid, old in zip(new, grids, strict=True)])
        tolerance = 2**-7 if format == "semi24_int4" else 1e-3  # bfloat16 scales, and the ridge
        assert torch.allclose(got.double(), best, rtol=tolerance, atol=0)
    assert bool((w[:, 0] == 0).all()) and all(grid.scales[0] == 1 for grid in new)
    for grid, old, span in zip(new, grids, spans, strict=True):
        assert torch.equal(grid.numbers(w[span]), old.numbers(before[span]))
    assert stored_scales(new).shape == FORMATS.get(format).grid.scale_shape(N, K)

    def error(weight):
        return (x @ (weight - original)).square().sum()

    assert error(w) < error(before)


@pytest.mark.parametrize(
    "pattern,format,message",
    [
        ("4:8", "semi24_int4", "format='semi24_int4' does not hold the pattern 4:8"),
        ("2:3", "semi24", "does not hold the pattern 2:3"),
        ("3:1000", "semi24", "does not hold the pattern 3:1000"),
        ("64x64", "semi24_int8", "does not hold the pattern 64x64"),
        ("unstructured", "semi24_fp8", "does not hold the pattern unstructured"),
        ("2:4", "semi24_int5", "unknown format 'semi24_int5'.*Did you mean"),
    ],
)
@pytest.mark.parametrize("name", [name for name, config in METHODS.items() if issubclass(config, OneShot)])
def test_formats_that_cannot_hold_the_pattern_are_refused(name, pattern, format, message):
    with pytest.raises(ValueError, match=message):
        METHODS.get(name)(pattern=pattern, format=format)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8", "1:2", "1:3", "1:16"])
@pytest.mark.parametrize("format", ["semi24", *FORMAT_NAMES])
def test_formats_that_hold_the_pattern_are_taken(pattern, format):
    assert METHODS.get("sparsegpt")(pattern=pattern, format=format).format == format
