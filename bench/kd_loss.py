"""The fused distillation loss beside torch: right against float64, then microseconds and bytes per second.

    python bench/kd_loss.py                            # 4096 tokens, vocabularies of Llama 2, Llama 3 and GPT-2
    python bench/kd_loss.py --vocabularies 128256 --tokens 1024

"torch" is `kd_loss_reference`, which writes the gradient over the logits as the kernel does; "autograd" is what one
would write: F.kl_div and F.cross_entropy on float32 logits, and their gradient. GB/s counts what must move: both logits
are read twice, and one of them is written.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from gpu_machine import Machine, Variant, num_copies, open_machine, say, time_turns
from sparsekit_kernels import kd_loss
from sparsekit_kernels.reference import kd_loss_reference
from torch import Tensor

VOCABULARIES = (32000, 128256, 50257)
CHECKED = ((5, 105), (3, 4096), (2, 50257), (2, 128256))  # tokens, vocabulary
WEIGHTS = {"kd_weight": 0.67, "ce_weight": 0.33, "temperature": 2.0}

Problem = tuple[Tensor, Tensor, Tensor]


def problem(tokens: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Logits of a student and a teacher, and labels, a quarter of which do not count."""
    logits, teacher = ((4 * torch.randn(tokens, vocabulary, device=device)).to(dtype) for _ in range(2))
    labels = torch.randint(0, vocabulary, (tokens,), device=device)
    labels[1::4] = -100
    return logits, teacher, labels


def wrong(tokens: int, vocabulary: int, dtype: torch.dtype, reverse: bool, device: torch.device) -> str | None:
    """Return what is wrong with the kernel on one problem: it may be twice as far from float64 as torch, not more."""
    logits, teacher, labels = problem(tokens, vocabulary, dtype, device)
    z64, z = logits.double(), logits.clone()
    truth = (*kd_loss_reference(z64, teacher.double(), labels, **WEIGHTS, reverse=reverse), z64)
    torch_own = (*kd_loss_reference(z, teacher, labels, **WEIGHTS, reverse=reverse), z)
    first = kd_loss.kd_loss(logits.clone(), teacher, labels, **WEIGHTS, reverse=reverse)
    found = (*kd_loss.kd_loss(logits, teacher, labels, **WEIGHTS, reverse=reverse), logits)
    if not all(map(torch.equal, first, found)):
        return "two calls differ"
    for name, x, own, exact in zip(("ce", "kd", "gradient"), found, torch_own, truth, strict=True):
        if not x.isfinite().all():
            return f"{name} is not finite"
        error, own_error = ((y.double() - exact).abs().max().item() for y in (x, own))
        limit = 2 * own_error + 1e-5
        if error > limit:
            return f"{name} is off by {error:.3g}, allowed {limit:.3g}"
    return None


def cases() -> list[tuple[int, int, torch.dtype, bool]]:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return [(*size, dtype, reverse) for size, dtype, reverse in itertools.product(CHECKED, dtypes, (False, True))]


def autograd(logits: Tensor, teacher: Tensor, labels: Tensor) -> None:
    z, T = logits.detach().requires_grad_(), WEIGHTS["temperature"]
    log_p, log_q = (F.log_softmax(x.float() / T, -1) for x in (z, teacher))
    counts = labels != -100
    kd = T**2 * (F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1) * counts).sum()
    ce = F.cross_entropy(z.float(), labels, reduction="sum")
    torch.autograd.grad(WEIGHTS["kd_weight"] * kd + WEIGHTS["ce_weight"] * ce, z)


def measure(tokens: int, vocabulary: int, machine: Machine) -> None:
    made = problem(tokens, vocabulary, torch.bfloat16, machine.device)
    num_bytes = 5 * made[0].nbytes
    copies = [tuple(x.clone() for x in made) for _ in range(num_copies(2 * made[0].nbytes, machine))]
    ways: dict[str, Callable[..., object]] = {
        "kernel": partial(kd_loss.kd_loss, **WEIGHTS),
        "torch": partial(kd_loss_reference, **WEIGHTS),
        "autograd": autograd,
    }
    variants = {
        name: Variant([partial(way, *copy) for copy in copies], num_bytes)
        for name, way in ways.items()
        if name != "autograd" or machine.dry_run or 40 * made[0].numel() < torch.cuda.mem_get_info()[0]
    }
    for name, times in time_turns(variants, machine).items():
        speed = num_bytes / times.median_us / 1e3
        row = {"tokens": tokens, "vocabulary": vocabulary, "way": name, "dtype": "bfloat16"}
        machine.record("kd_loss", row | {"median_us": times.median_us, "min_us": times.min_us, "gb_s": speed})
        say(f"{tokens:6} x {vocabulary:6}  {name:9} {times.median_us:10.1f} us {speed:8.0f} GB/s")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    machine, options = open_machine(__doc__.splitlines()[0], parser)
    if machine.dry_run:
        import gpu_dry

        gpu_dry.install()
    torch.manual_seed(0)
    tried = cases()[: machine.size(len(cases()), 6)]
    troubles = [f"{case}: {trouble}" for case in tried if (trouble := wrong(*case, machine.device))]
    say("\n".join([f"{len(tried)} cases, {len(troubles)} wrong", *troubles]))
    for vocabulary in options.vocabularies:
        if not machine.is_late(f"a vocabulary of {vocabulary}", 30):
            measure(machine.size(options.tokens, 4), machine.size(vocabulary, 105), machine)
            machine.free_memory()
    return 1 if troubles else 0


if __name__ == "__main__":
    sys.exit(main())
