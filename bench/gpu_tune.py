"""Find the fastest launch for every format, layer and number of tokens, and write the table that the package ships.

    python bench/gpu_tune.py          # writes <gpu>-table.json in $OUT, and copies it to kernels/…/configs/<gpu>.json
    python bench/gpu_tune.py --short  # few launches: the copy is made only where the package has no table yet

First many launches of the fragment kernel are timed on one layer; the best few of each number of tokens then compete on
every layer, with K split in several ways. For many tokens the three kernels of `prefill24` and the dense product
compete. Kernels are compiled by several processes beforehand. Each row of the table is stored as soon as it is known.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from gpu_kernels import (
    BLOCK_FORMATS,
    FORMATS,
    LAYERS,
    WAYS,
    Weight,
    dense_linear,
    mma_kernel,
    pack,
    random24,
    random_blocks,
)
from gpu_machine import Machine, Times, Variant, num_copies, open_machine, say, time_turns
from sparsekit_kernels import spmm24_mma, spmm_block, tuning
from sparsekit_kernels.spmm24_mma import Config
from torch import Tensor

DECODE = (1, 2, 4, 8, 16, 32, 64)
PREFILL = (96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
MMA_MOST = 1024  # tokens, to try the fragment kernel at
FIRST_LAYER = "8B gate_up"
SHORT = 6  # launches of each number of tokens in a short run
KEPT = 3  # launches that go on from the first round
WARPS = ((1, 8), (2, 4), (4, 2))  # WARPS_N, WARPS_K
SPLITS = (1, 2, 4, 8)
COMPILE_SECONDS = 150  # at most, and at most a third of what is left


def launches(format: str, M: int) -> list[Config]:
    """Return the launches to try for M tokens, the shipped one first."""
    chunks = spmm24_mma.CHUNKS[format]
    found = [replace(spmm24_mma.pick_config(format, M, *LAYERS[FIRST_LAYER], 132), SPLIT_K=1)]
    for row_tiles, ahead in ((1, chunks), (1, chunks // 2), (2, chunks), (2, chunks // 2), (4, chunks // 2)):
        sums, loads = found[0].TOKENS * row_tiles // 2, 4 * row_tiles * (ahead + 1)  # registers
        if sums + 2 * loads <= 180:
            shape = replace(found[0], ROW_TILES=row_tiles, AHEAD=ahead)
            for (n, k), packed in itertools.product(
                WARPS, (False,) if M <= 2 else (False, True) if M <= 16 else (True,)
            ):
                found.append(replace(shape, WARPS_N=n, WARPS_K=k, PACKED_X=packed))
    return list(dict.fromkeys(found))


class Layer:
    """One layer's weight in one format, in copies."""

    def __init__(self, name: str, format: str, machine: Machine) -> None:
        N, K = LAYERS[name]
        N, K = machine.size(N, 64), machine.size(K, 512)
        torch.manual_seed(N + K)
        self.name, self.machine = name, machine
        self.weight = pack(random24(N, K, torch.bfloat16, machine.device), format)
        self.prepared = WAYS["mma"].prepare(self.weight)
        self.num_bytes = sum(tensor.nbytes for tensor in self.prepared)
        self.copies = copied(self.prepared, num_copies(self.num_bytes, machine))

    def variant(self, x: Tensor, config: Config) -> Variant:
        kernel, N = mma_kernel(self.weight.format), self.weight.N
        calls = [partial(kernel, x, *copy, N, config=config) for copy in self.copies]
        return Variant(calls, self.num_bytes + x.nbytes + x.shape[0] * N * 2)

    def time(self, M: int, configs: Iterable[Config], rounds: int) -> dict[Config, Times]:
        """Return the times of the launches that run; the others are said to fail."""
        x = torch.randn(M, self.weight.K, device=self.machine.device).bfloat16()
        variants: dict[str, Variant] = {}
        by_name: dict[str, Config] = {}
        for config in configs:
            variant = self.variant(x, config)
            try:
                variant.calls[0]()
            except RuntimeError as error:
                say(f"{self.weight.format} M={M} {config}: {str(error)[:200]}")
                continue
            variants[str(config)], by_name[str(config)] = variant, config
        times = time_turns(variants, self.machine, rounds)
        return {by_name[name]: result for name, result in times.items()}


def copied(tensors: tuple[Tensor, ...], count: int) -> list[tuple[Tensor, ...]]:
    return [tensors, *(tuple(tensor.clone() for tensor in tensors) for _ in range(count - 1))]


def first_round(format: str, most: int, machine: Machine) -> dict[int, list[Config]]:
    """Return, for every number of tokens, those of the first `most` launches that are fastest on one layer."""
    layer = Layer(FIRST_LAYER, format, machine)
    best: dict[int, list[Config]] = {}
    for M in DECODE[: machine.size(len(DECODE), 1)]:
        if machine.is_late(f"{format} M={M}"):
            break
        times = layer.time(M, launches(format, M)[: machine.size(most, 3)], rounds=5)
        ranked = sorted(times, key=lambda config: times[config].median_us)
        best[M] = ranked[:KEPT]
        shipped, fastest = launches(format, M)[0], ranked[0]
        gb_s = layer.num_bytes / times[fastest].median_us / 1e3
        say(
            f"{format:12} {FIRST_LAYER} M={M:<3} {times[fastest].median_us:8.2f} us {gb_s:5.0f} GB/s {short(fastest)}"
            f"   shipped {times[shipped].median_us:8.2f} us {short(shipped)}"
        )
    return best


def numbers(config: Config) -> dict[str, int | str]:
    """The launch as the table holds it: numbers, flags as 0 and 1."""
    return {name: int(value) for name, value in vars(config).items()}


def short(config: Config) -> str:
    return " ".join(f"{name}={value}" for name, value in numbers(config).items())


def second_round(name: str, format: str, best: dict[int, list[Config]], machine: Machine) -> None:
    """Let the kept launches, with K split in several ways, compete on one layer; store the winners."""
    layer = Layer(name, format, machine)
    dense = dense_copies(layer.weight, machine)
    for M, kept in best.items():
        if machine.is_late(f"{format} {name} M={M}", needed=machine.size(2, 0)):
            return
        x = torch.randn(M, layer.weight.K, device=machine.device).bfloat16()
        configs = [replace(config, SPLIT_K=split) for config in kept for split in SPLITS if fits(config, split, layer)]
        configs = configs[: machine.size(99, 2)]
        times = layer.time(M, configs, rounds=9)
        fastest = min(times, key=lambda config: times[config].median_us)
        own = time_turns({"dense": Variant([partial(dense_linear, x, w) for w in dense], dense[0].nbytes)}, machine, 9)
        row = {
            "mma": tuning.Measured(round(times[fastest].median_us, 3), numbers(fastest)),
            "dense": tuning.Measured(round(own["dense"].median_us, 3)),
        }
        store(layer.weight, M, row, machine)


def fits(config: Config, split: int, layer: Layer) -> bool:
    """Return whether every warp still has a step of K."""
    return split == 1 or split * config.WARPS_K <= -(-layer.weight.K // 256)


def dense_copies(weight: Weight, machine: Machine) -> list[Tensor]:
    w = weight.dense.bfloat16()
    return [w, *(w.clone() for _ in range(num_copies(w.nbytes, machine) - 1))]


def prefill(name: str, format: str, machine: Machine) -> None:
    """Time the kernels for many tokens and the dense product on one layer; store the table's rows."""
    layer = Layer(name, format, machine)
    weight, dense = layer.weight, dense_copies(layer.weight, machine)
    ways = [WAYS[way] for way in ("mma", "decompress", "cusparselt") if WAYS[way].why_not(weight) is None]
    copies = {way.name: copied(way.prepare(weight), num_copies(layer.num_bytes, machine)) for way in ways}
    for M in PREFILL[: machine.size(len(PREFILL), 1)]:
        if machine.is_late(f"prefill {name} M={M}", needed=machine.size(3, 0)):
            return
        x = torch.randn(M, weight.K, device=machine.device).bfloat16()
        variants = {"dense": Variant([partial(dense_linear, x, w) for w in dense], dense[0].nbytes)}
        for way in ways:
            if way.name == "mma" and M > MMA_MOST:
                continue
            calls = [partial(way.linear, x, copy, weight) for copy in copies[way.name]]
            variants[way.name] = Variant(calls, layer.num_bytes)
        times = time_turns(variants, machine, rounds=7)
        row = {kernel: tuning.Measured(round(result.median_us, 3)) for kernel, result in times.items()}
        if "mma" in row:
            config = spmm24_mma.pick_config(format, M, weight.N, weight.K, machine.facts.get("sms", 132))
            row["mma"] = tuning.Measured(row["mma"].us, numbers(config))
        store(weight, M, row, machine)


def store(weight: Weight, M: int, row: tuning.Row, machine: Machine) -> None:
    """Keep one row of the table, in the cache that is exported at the end and among the results."""
    key = tuning.key(weight.format, weight.dtype, weight.N, weight.K, M)
    # Without a time, a kernel that was not worth timing: the dispatcher will not measure the shape again for its sake.
    untimed = {name: tuning.Measured(None) for name in ("mma", "decompress", "cusparselt") if name not in row}
    tuning.store(key, row | untimed, machine.device)
    kernels = {kernel: {"us": entry.us, "config": entry.config} for kernel, entry in row.items()}
    machine.record("gpu_tune", {**key._asdict(), "kernels": kernels})
    dense = row["dense"].us or 0.0
    best = min((kernel for kernel in row if kernel != "dense"), key=lambda kernel: row[kernel].us or float("inf"))
    us = row[best].us or float("inf")
    say(f"{weight.format:12} {weight.N:6}x{weight.K:<6} M={M:<5} {best:10} {us:9.2f} us, {dense / us:5.2f} times dense")


def blocks(format: str, name: str, machine: Machine) -> None:
    """Time launches of the block kernel beside the shipped ones, for the record: its table is in its module."""
    N, K = LAYERS[name]
    N, K = machine.size(N, 256), machine.size(K, 512)
    block, density = BLOCK_FORMATS[format]
    weight = pack(random_blocks(N, K, block, density, torch.bfloat16, machine.device), format)
    prepared = WAYS["block"].prepare(weight)
    num_bytes = sum(tensor.nbytes for tensor in prepared)
    copies = copied(prepared, num_copies(num_bytes, machine))
    for M in (*DECODE, 128, 2048)[: machine.size(9, 1)]:
        if machine.is_late(f"{format} M={M}", needed=machine.size(4, 0)):
            return
        x = torch.randn(M, K, device=machine.device).bfloat16()
        shipped = spmm_block.pick_config(M, torch.bfloat16, block[0])
        variants = {}
        for config in block_launches(shipped, M, block[0])[: machine.size(99, 3)]:
            calls = [partial(spmm_block.spmm_block, x, copy, N, config=config) for copy in copies]
            try:
                calls[0]()
            except RuntimeError as error:  # too much shared memory, most often
                say(f"{format} M={M} {short_block(config)}: {str(error)[:120]}")
                continue
            variants[short_block(config)] = Variant(calls, num_bytes)
        times = time_turns(variants, machine, rounds=5)
        ranked = sorted(times, key=lambda launch: times[launch].median_us)
        for launch in ranked:
            row = {"format": format, "N": N, "K": K, "M": M, "launch": launch, "us": times[launch].median_us}
            machine.record("gpu_tune_block", row | {"shipped": launch == short_block(shipped)})
        say(
            f"{format:20} {name} M={M:<5} {times[ranked[0]].median_us:8.2f} us {ranked[0]}   shipped "
            f"{times[short_block(shipped)].median_us:8.2f} us {short_block(shipped)}"
        )


def short_block(config: spmm_block.Config) -> str:
    return " ".join(f"{name}={value}" for name, value in vars(config).items())


def block_launches(shipped: spmm_block.Config, M: int, BN: int) -> list[spmm_block.Config]:
    """The shipped launch of the block kernel, and others near it."""
    found = [shipped]
    for rows, scale, warps, depth in itertools.product((1, 2), (0.5, 1, 2), (4, 8), (-1, 0, 1)):
        if rows * shipped.ROWS > BN or (shipped.depth == 0 and depth) or shipped.depth + depth < shipped.depth % 2:
            continue
        BLOCK_K = int(shipped.BLOCK_K * scale)
        if BLOCK_K >= 16:
            changed = {
                "ROWS": rows * shipped.ROWS,
                "BLOCK_K": BLOCK_K,
                "num_warps": warps,
                "depth": shipped.depth + depth,
            }
            found.append(replace(shipped, **changed))
    return list(dict.fromkeys(found))


def compile_launches(jobs: list[tuple[str, int, Config]], machine: Machine) -> None:
    """Compile launches in several processes, which leave them in Triton's cache on disk."""
    if machine.dry_run:
        run_once(jobs[:2], machine)
        return
    count = max(min((os.cpu_count() or 2) - 2, 14), 1)
    texts = [f"{format};{M};{';'.join(map(str, numbers(config).values()))}" for format, M, config in jobs]
    shares = [texts[i::count] for i in range(count)]
    command = [sys.executable, __file__, "--seconds", str(COMPILE_SECONDS), "--compile"]
    workers = [subprocess.Popen([*command, *share]) for share in shares if share]
    until = time.monotonic() + min(machine.seconds_left() / 3, COMPILE_SECONDS)
    for worker in workers:
        try:
            worker.wait(timeout=max(until - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            worker.kill()


def picked(layers: Iterable[tuple[int, int]], tokens: Iterable[int], machine: Machine) -> list[tuple[str, int, Config]]:
    """Return what `compile_launches` takes for the launches that the package picks for weights [N, K]."""
    found: dict[tuple[str, Config], int] = {}
    for (N, K), M, format in itertools.product(layers, tokens, FORMATS):
        known = tuning.lookup(tuning.key(format, torch.bfloat16, N, K, M), machine.device)
        config = known[0]["mma"].config if known is not None and "mma" in known[0] else {}
        launch = Config(**config) if config else spmm24_mma.pick_config(format, M, N, K, machine.facts.get("sms", 132))
        found[format, launch] = M
    return [(format, M, config) for (format, config), M in found.items()]


def run_once(jobs: Iterable[tuple[str, int, Config]], machine: Machine) -> None:
    """Call each launch on a small weight, with all of K in whole turns and not."""
    for format, M, config in jobs:
        if machine.is_late("compiling"):
            return
        turn = 256 * config.WARPS_K * config.SPLIT_K
        for K in (turn, turn + 256):
            weight = pack(random24(256, K, torch.bfloat16, machine.device), format)
            x = torch.randn(M, K, device=machine.device).bfloat16()
            try:
                mma_kernel(format)(x, *WAYS["mma"].prepare(weight), 256, config=config)
            except RuntimeError as error:
                say(f"{format} M={M} {short(config)} does not run: {str(error)[:200]}")


def parsed(text: str) -> tuple[str, int, Config]:
    """The inverse of what `compile_launches` passes on."""
    format, M, *values = text.split(";")
    return format, int(M), Config(**dict(zip(Config.__dataclass_fields__, map(int, values), strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--layers", nargs="*", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--short", action="store_true", help="few launches, as where other stages want the time")
    parser.add_argument("--cache", help="folder of the measurements, as $SPARSEKIT_TUNING; default: one of its own")
    parser.add_argument("--compile", nargs="*", help="of a worker: launches to compile")
    machine, options = open_machine(__doc__.splitlines()[0], parser)
    if machine.dry_run:
        import gpu_dry

        gpu_dry.install()
    if options.compile:
        run_once(map(parsed, options.compile), machine)
        return 0
    os.environ["SPARSEKIT_TUNING"] = options.cache or tempfile.mkdtemp()  # exported after every layer
    most = SHORT if options.short else 99
    first = {(format, c): M for format in options.formats for M in DECODE for c in launches(format, M)[:most]}
    jobs = [(format, M, config) for (format, config), M in first.items()]
    say(f"compiling {len(jobs)} launches")
    compile_launches(jobs, machine)
    best = {format: first_round(format, most, machine) for format in options.formats}
    kept = {(f, c.TOKENS, c): M for f in best for M, configs in best[f].items() for c in configs}
    jobs = [(f, M, replace(c, SPLIT_K=split)) for (f, _, c), M in kept.items() for split in SPLITS[1:]]
    say(f"compiling {len(jobs)} launches that split K")
    compile_launches(jobs, machine)
    path = machine.out_dir / f"{machine.slug}-table.json"
    for name in options.layers:
        if "semi24" in options.formats:
            prefill(name, "semi24", machine)
        for format in options.formats:
            second_round(name, format, best[format], machine)
        machine.free_memory()
        count = tuning.export(machine.device, path)
    quantised = [format for format in options.formats if format != "semi24"]
    for name, format in itertools.product(options.layers[: machine.size(99, 1)], quantised):
        if not machine.is_late(f"prefill of {name} in {format}", needed=machine.size(10, 0)):
            prefill(name, format, machine)
            count = tuning.export(machine.device, path)
    if not options.short:
        for format in list(BLOCK_FORMATS)[: machine.size(len(BLOCK_FORMATS), 1)]:
            blocks(format, FIRST_LAYER, machine)
    say(f"tune: {count} rows in {path}")
    if count:
        install(path, tuning.CONFIG_DIR if not machine.dry_run else machine.out_dir / "configs", options.short, machine)
    return 0 if count else 1


def install(table: Path, folder: Path, short: bool, machine: Machine) -> None:
    """Copy a table to where the package looks for it; that of a short run takes no other's place."""
    shipped = folder / f"{tuning.slug(machine.name)}.json"
    if short and shipped.exists():
        say(f"{shipped} stays: a short run has less than it may hold")
        return
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(table, shipped)
    say(f"it is now {shipped}: commit it")


if __name__ == "__main__":
    sys.exit(main())
