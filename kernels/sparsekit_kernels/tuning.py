"""Which kernel runs which shape: times measured on this type of GPU, kept in tables, and how they are taken.

**The table.** A table says, for one type of GPU, how long every kernel took on a weight [N, K] and M tokens. It is one
JSON file, `configs/<gpu>.json` here for the types that were measured (the name of the GPU in small letters and dashes,
`nvidia-h200.json`; none yet), and small files of the same form in the user's cache for what was measured at home:

    {"version": 1,                                     of this form; another is ignored
     "gpu": "NVIDIA H200",                             as torch names it
     "measured_with": {"torch": "2.13.0", "triton": "3.7.0", "cuda": "13.0", "cusparselt": 801, "kernels": "9f3c…"},
     "rows": [{"format": "semi24", "dtype": "bfloat16", "N": 4096, "K": 14336, "M": 256,
               "kernels": {"mma":        {"us": …, "config": {…}},
                           "decompress": {"us": …, "config": {}},
                           "cusparselt": {"us": …, "config": {…}},
                           "dense":      {"us": …, "config": {}}}}]}

`us` is the median time on the device in microseconds with a cold L2 (null where the kernel could not run, or only its
config was searched), `config` what the kernel wants to be launched with. "dense" is the multiplication by a resident
dense weight, so that a row also says when sparse is not worth it. M is a bucket: the smallest of 1, 2, 4, … 64, 96,
128, 192, … 6144, 8192 that holds the tokens (more than 8192 count as 8192). Nobody writes numbers by hand: a shipped
table is `export`ed from the cache of a machine that measured; it then serves other versions too, and says its own.

**The order.** A shape is looked up in the user's cache (measured on this very machine), then in the shipped table. If
neither has it, the dispatcher measures it once, on first use, and writes it to the cache; where it must not measure
(while a CUDA graph is captured, under a compiler, without a GPU, or when told so) it follows a rule of thumb and says
that nothing was measured. A row that lacks a kernel is completed: its configs stay, and the new kernel is measured
beside the others in theirs. A row whose config a kernel cannot be launched with (`CHECKS`), as of a version that named
its numbers otherwise, is ignored with a warning, and replaced where measuring is allowed.

Threads that meet a new shape together measure it once. Processes do not wait for each other: the ranks of a
distributed job that measure on first use may come to different kernels where two are about equally fast, and so to
results that differ in the last bits. Where all ranks must agree, give them tables (`bench/gpu.sh tune`, or one run on
one GPU whose cache they share) or set SPARSEKIT_TUNING=off.

**The cache.** One file for each shape in `tuning/<gpu>-<versions>/` under $SPARSEKIT_CACHE, $XDG_CACHE_HOME/sparsekit
or ~/.cache/sparsekit. The versions are those of "measured_with", where "kernels" is a digest of this package's sources
and so of its layouts. Files are written beside their place and renamed into it: readers see a whole file or none, and
processes that measure the same shape at the same time leave one of their answers. A file that cannot be read, or that
another GPU or version wrote, is ignored with a warning, measured again and replaced. A folder that cannot be written
costs a warning, once, and the choice is kept for this process. $SPARSEKIT_TUNING=off measures nothing and reads
only shipped tables; any other value of it is the cache folder to use.

Times are of the device alone. The time the host needs to launch a kernel is hidden while the GPU has work, and always
in a CUDA graph; cuSPARSELt, whose plan is made anew by each call (see `cusparselt`), is where that matters.
"""

import functools
import hashlib
import json
import math
import os
import re
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparsekit_kernels.cpu.build import cache_dir

VERSION = 1
CONFIG_DIR = Path(__file__).parent / "configs"
MAX_BUCKET = 8192

Call = Callable[[], object]


class Key(NamedTuple):
    """What a row of a table is about."""

    format: str  # of the weight, "semi24"; or a search of its own, "cusparselt-search"
    dtype: str  # of x and y, without "torch."
    N: int
    K: int
    M: int  # a bucket


@dataclass(frozen=True)
class Measured:
    """One kernel on one shape."""

    us: float | None  # median microseconds on the device; None where only the config was searched
    config: Mapping[str, int | str] = field(default_factory=dict)


Row = dict[str, Measured]


CHECKS: dict[str, Callable[[Key, Mapping[str, int | str]], object]] = {}
"""Kernel -> what raises TypeError or ValueError for a config that it cannot be launched with. `prefill24` fills it."""


class Candidate(NamedTuple):
    """One way to do the work, to be measured against others."""

    kernel: str
    calls: Sequence[Call]  # they do the same with copies of the data; most often one
    config: Mapping[str, int | str] = {}


class Choice(NamedTuple):
    """The kernel to run and where the decision comes from."""

    kernel: str
    config: Mapping[str, int | str]
    source: str  # "cache", "table", "measured" or "rule"
    lasts: bool = True  # False where only the moment forbids to measure: ask again next time

    def __str__(self) -> str:
        return f"{self.kernel} (a rule of thumb: not measured)" if self.source == "rule" else self.kernel


class Standing(NamedTuple):
    """How the fastest sparse kernel stands against a resident dense weight."""

    M: int  # a bucket
    kernel: str
    us: float
    dense_us: float

    @property
    def speedup(self) -> float:
        return self.dense_us / self.us


def bucket(M: int) -> int:
    """Return the bucket of M >= 1 tokens: powers of two, above 64 also 1.5 times those, at most 8192."""
    if M > MAX_BUCKET:
        return MAX_BUCKET
    power = 1 << (M - 1).bit_length()
    return power - power // 4 if power > 64 and M <= power - power // 4 else power


def key(format: str, dtype: torch.dtype, N: int, K: int, M: int) -> Key:
    """Return the key of M >= 1 tokens and a weight [N, K]."""
    return Key(format, str(dtype).removeprefix("torch."), N, K, bucket(M))


def lookup(key: Key, device: torch.device) -> tuple[Row, str] | None:
    """Return the row of `key` and its source, "cache" or "table"; None where nothing was measured."""
    name = gpu_name(device)
    path = _cache_path(key, name)
    if path is not None:
        row = _read_cache(path, name).get(key)
        if row is not None and _is_sound(key, row, path):
            return row, "cache"
    row = _shipped(name).get(key)
    return (row, "table") if row is not None and _is_sound(key, row, _shipped_path(name)) else None


def store(key: Key, row: Row, device: torch.device) -> None:
    """Write a row to the user's cache; warn, once, where that cannot be done."""
    name = gpu_name(device)
    path = _cache_path(key, name)
    if path is None:
        return
    try:
        _write(path, _document(name, versions(), {key: row}))
    except OSError as error:
        _warn_of_unwritable_cache(str(path.parent), str(error))


def choose(
    key: Key,
    device: torch.device,
    allowed: Iterable[str],
    rule: str,
    candidates: Callable[[], Sequence[Candidate]],
) -> Choice:
    """Return the fastest of the allowed kernels: looked up, else measured, else the one named by the rule.

    Args:
        key: the shape.
        device: where it will run.
        allowed: names of the kernels that can run now.
        rule: the one of them to run where nothing was and nothing can be measured.
        candidates: makes what is measured: every allowed kernel, in one config or several, in any case in the one
            that is known to be best (`best_config`), and "dense" for the record.
    Raises:
        RuntimeError: no candidate runs; the message has the error of each.
    """
    allowed = tuple(allowed)
    choice = known(key, device, allowed, rule)
    if choice.lasts or not may_measure(device):
        return choice
    try:
        with _measuring:
            choice = known(key, device, allowed, rule)  # another thread may have measured it meanwhile
            if choice.lasts:
                return choice
            row = _measure_row(key, device, candidates)
    except torch.OutOfMemoryError:
        warnings.warn(f"no memory left to measure {key}: a rule of thumb chooses its kernel for now", stacklevel=3)
        return choice._replace(lasts=True)
    return _fastest(row, allowed, rule, "measured")


def known(key: Key, device: torch.device, allowed: Iterable[str], rule: str) -> Choice:
    """Return what `choose` does without measuring; `lasts` is False where measuring, once possible, may change it."""
    allowed = tuple(allowed)
    found = lookup(key, device)
    choice = Choice(rule, {}, "rule") if found is None else _fastest(found[0], allowed, rule, found[1])
    complete = found is not None and all(name in found[0] for name in allowed)
    return choice._replace(lasts=complete or not may_ever_measure(device))


def against_dense(
    format: str, dtype: torch.dtype, N: int, K: int, device: torch.device, allowed: Iterable[str] | None = None
) -> list[Standing]:
    """Return, for every bucket that was measured, how the fastest sparse kernel stands against a dense weight.

    Nothing is measured here: an empty list means that no table and no cache knows this weight on this GPU.

    Args:
        allowed: kernels that may run; None for all in the row.
    """
    standings = []
    for M, row in sorted(_rows_of(format, str(dtype).removeprefix("torch."), N, K, device).items()):
        dense = row.get("dense")
        sparse = {
            name: entry.us
            for name, entry in row.items()
            if entry.us is not None and name != "dense" and (allowed is None or name in allowed)
        }
        if dense is not None and dense.us is not None and sparse:
            best = min(sparse, key=sparse.__getitem__)
            standings.append(Standing(M, best, sparse[best], dense.us))
    return standings


def may_measure(device: torch.device) -> bool:
    """Return whether measuring is allowed here and now."""
    return (
        may_ever_measure(device) and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()
    )


def may_ever_measure(device: torch.device) -> bool:
    """Return whether measuring is allowed in this process, if not now then later."""
    return device.type == "cuda" and not is_switched_off()


def is_switched_off() -> bool:
    """Return whether $SPARSEKIT_TUNING forbids to measure and to use the cache."""
    return os.environ.get("SPARSEKIT_TUNING", "").lower() in ("off", "0")


def measure(
    candidates: Sequence[Candidate],
    device: torch.device,
    *,
    rounds: int = 15,
    warmup: int = 3,
    max_seconds: float = 2.0,
) -> list[float]:
    """Return the median microseconds of each candidate on the device.

    Candidates take turns, forwards and backwards, so that clocks and neighbours are the same for all. Before each call
    the L2 is overwritten, which also keeps the GPU busy until the host has launched the call, so that the events
    around it see the device alone. A candidate of several calls rotates over them.

    Args:
        candidates: what to time.
        rounds: times per candidate; fewer, but not below three, once `max_seconds` are over.
        warmup: untimed calls of each candidate: they compile, search and fill caches.
    Raises:
        ValueError: there is no candidate, or one has no calls.
        RuntimeError: measuring is not allowed now (see `may_measure`).
    """
    if not candidates or not all(candidate.calls for candidate in candidates):
        raise ValueError(f"nothing to measure in {list(candidates)}: give every candidate at least one call")
    if not may_measure(device):
        raise RuntimeError(
            f"cannot measure on {device} now: not while a CUDA graph is captured, under torch.compile, without a GPU "
            "or with SPARSEKIT_TUNING=off"
        )
    time_call = _timer(device)
    for turn in range(warmup):
        for candidate in candidates:
            candidate.calls[turn % len(candidate.calls)]()
    times: list[list[float]] = [[] for _ in candidates]
    started = time.perf_counter()
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() - started > max_seconds:
            break
        order = range(len(candidates))
        for i in order if turn % 2 == 0 else reversed(order):
            calls = candidates[i].calls
            times[i].append(time_call(calls[turn % len(calls)]))
    return [statistics.median(values) * 1e6 for values in times]


def best_config(kernel: str, key: Key, device: torch.device) -> Mapping[str, int | str] | None:
    """Return the config in which a kernel was fastest; None where it was not measured, or its own choice was."""
    found = lookup(key, device)
    entry = None if found is None else found[0].get(kernel)
    return None if entry is None or entry.us is None or not entry.config else entry.config


def export(device: torch.device, path: Path) -> int:
    """Write all times that the cache has of this GPU as one table, for `configs/`; return its number of rows."""
    name = gpu_name(device)
    folder = _cache_folder(name)
    files = sorted(folder.glob("*.json")) if folder is not None else []
    cached = {key: row for file in files for key, row in _read_cache(file, name).items()}
    timed = {key: row for key, row in cached.items() if any(entry.us is not None for entry in row.values())}
    _write(path, _document(name, versions(), timed))
    return len(timed)


@functools.cache
def gpu_name(device: torch.device) -> str:
    """Return the name of the GPU; "cpu" for what is none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def versions() -> dict[str, str | int | None]:
    """Return what a measurement depends on besides the GPU."""
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = None
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return {
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "cusparselt": torch.backends.cusparselt.version(),
        "kernels": digest.hexdigest()[:16],
    }


def read_table(path: Path) -> tuple[str, dict[str, Any], dict[Key, Row]]:
    """Return (name of the GPU, versions it was measured with, rows) of a table.

    Raises:
        ValueError: the file is no table of this version; the message says what is wrong.
        OSError: it cannot be read.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["version"] != VERSION:
            raise ValueError(f"it has version {document['version']!r}, this package reads {VERSION}")
        rows = {_parsed_key(row): _parsed_row(row["kernels"]) for row in document["rows"]}
        gpu, measured_with = document["gpu"], document["measured_with"]
        if not isinstance(gpu, str) or not isinstance(measured_with, dict):
            raise ValueError("its GPU is no name, or its versions are no names and values")
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from None
    return gpu, measured_with, rows


def slug(name: str) -> str:
    """Return the name of a GPU as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


_measuring = threading.RLock()  # two measurements at a time would time each other, and the second has nothing to find


def _measure_row(key: Key, device: torch.device, candidates: Callable[[], Sequence[Candidate]]) -> Row:
    """Measure candidates, store the row of the fastest config of each kernel, and return it.

    What was known of other kernels stays, and so does a config in which a kernel was faster than in those measured now.
    A kernel that fails is recorded as one that cannot run. Of several configs of a kernel some may fail in silence: it
    is for the measurement to find out which fit the GPU.

    Raises:
        RuntimeError: measuring is not allowed now, or no candidate runs; the message has the errors.
        torch.OutOfMemoryError: there is no memory for what is measured.
    """
    found = lookup(key, device)
    before = {} if found is None else found[0]
    usable, failed = _try_all(key, candidates())
    times = measure(usable, device)
    row: Row = before | {kernel: Measured(None) for kernel in sorted(failed)}
    for us, candidate in sorted(zip(times, usable, strict=True), key=lambda pair: pair[0], reverse=True):
        row[candidate.kernel] = Measured(round(us, 3), dict(candidate.config))  # the fastest config comes last
    for kernel, entry in before.items():
        new = row[kernel]
        tuned = bool(entry.config) and entry.config != new.config
        if tuned and entry.us is not None and new.us is not None and entry.us <= new.us:
            row[kernel] = entry
    store(key, row, device)
    return row


def _try_all(key: Key, candidates: Sequence[Candidate]) -> tuple[list[Candidate], set[str]]:
    """Call each once; return those that run, and the kernels of which none does, with a warning that has the error."""
    usable, errors = [], {}
    for candidate in candidates:
        try:
            candidate.calls[0]()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of torch, Triton, ptxas or cuSPARSELt: each has its own
            errors[candidate.kernel] = f"{type(error).__name__}: {error}"
        else:
            usable.append(candidate)
    if not usable:
        raise RuntimeError(f"no kernel runs {key}: {errors}")
    failed = set(errors) - {candidate.kernel for candidate in usable}
    for kernel in sorted(failed):
        warnings.warn(f"{kernel} cannot run {key}, so it is left out: {errors[kernel]}", stacklevel=4)
    return usable, failed


def _fastest(row: Row, allowed: tuple[str, ...], rule: str, source: str) -> Choice:
    times = {name: row[name].us for name in allowed if name in row}
    measured = {name: us for name, us in times.items() if us is not None}
    if not measured:
        return Choice(rule, {}, "rule")
    best = min(measured, key=measured.__getitem__)
    return Choice(best, row[best].config, source)


def _timer(device: torch.device) -> Callable[[Call], float]:
    """Return a timer of one call, in seconds on the device, with a cold L2 and the launch hidden."""
    size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 64 << 20)
    scratch = torch.empty(size, dtype=torch.int8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time_call(call: Call, repeats: int) -> float:
        with torch.cuda.device(device):
            for _ in range(repeats):
                scratch.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3

    time_call(scratch.zero_, 1)
    once = time_call(scratch.zero_, 1)
    # Half a millisecond of it: a plan of cuSPARSELt takes the host up to 0.2.
    return functools.partial(time_call, repeats=min(max(math.ceil(5e-4 / max(once, 1e-6)), 1), 50))


def _cache_folder(gpu: str) -> Path | None:
    """The cache of this GPU and these versions; None where it is switched off."""
    if is_switched_off():
        return None
    asked = os.environ.get("SPARSEKIT_TUNING")
    digest = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode()).hexdigest()[:12]
    return (Path(asked) if asked else cache_dir() / "tuning") / f"{slug(gpu)}-{digest}"


def _cache_path(key: Key, gpu: str) -> Path | None:
    folder = _cache_folder(gpu)
    return None if folder is None else folder / f"{key.format}_{key.dtype}_{key.N}x{key.K}_M{key.M}.json"


def _read_cache(path: Path, gpu: str) -> dict[Key, Row]:
    """The rows of a file of the cache; none where there is no file, or none that can be believed."""
    try:
        found, measured_with, rows = read_table(path)
        if found != gpu or measured_with != versions():
            raise ValueError(f"it was measured on {found} with {measured_with}")
        return rows
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"ignoring the tuning cache {path}, it will be measured again: {error}", stacklevel=4)
        return {}


def _is_sound(key: Key, row: Row, path: Path) -> bool:
    """Return whether kernels can be launched with the configs of a row, as far as they say; if not, warn, once."""
    for kernel, entry in row.items():
        try:
            if entry.config and kernel in CHECKS:
                CHECKS[kernel](key, entry.config)
        except (TypeError, ValueError) as error:
            _warn_of_unsound_row(path, key, f"{kernel} cannot be launched with {dict(entry.config)}: {error}")
            return False
    return True


@functools.cache
def _warn_of_unsound_row(path: Path, key: Key, error: str) -> None:
    warnings.warn(f"ignoring what {path} says of {tuple(key)}: {error}", stacklevel=5)


def _shipped_path(gpu: str) -> Path:
    return CONFIG_DIR / f"{slug(gpu)}.json"


@functools.cache
def _shipped(gpu: str) -> dict[Key, Row]:
    path = _shipped_path(gpu)
    if not path.exists():
        return {}
    try:
        return read_table(path)[2]
    except (OSError, ValueError) as error:
        warnings.warn(f"ignoring the shipped table {path}: {error}", stacklevel=4)
        return {}


def _rows_of(format: str, dtype: str, N: int, K: int, device: torch.device) -> dict[int, Row]:
    """Bucket -> row of one weight, the cache before the shipped table."""
    name = gpu_name(device)
    keys = {key for key in _shipped(name) if key[:4] == (format, dtype, N, K)}
    folder = _cache_folder(name)
    for path in sorted(folder.glob(f"{format}_{dtype}_{N}x{K}_M*.json")) if folder is not None else ():
        keys |= _read_cache(path, name).keys()
    return {key.M: found[0] for key in keys if (found := lookup(key, device)) is not None}


def _parsed_key(row: Mapping[str, Any]) -> Key:
    key = Key(row["format"], row["dtype"], row["N"], row["K"], row["M"])
    numbers = all(type(number) is int and number > 0 for number in key[2:])
    if not numbers or not isinstance(key.format, str) or not isinstance(key.dtype, str) or bucket(key.M) != key.M:
        raise ValueError(f"it has a row for {tuple(key)}")
    return key


def _parsed_row(kernels: Mapping[str, Any]) -> Row:
    row = {}
    for name, entry in kernels.items():
        us, config = entry["us"], entry["config"]
        if us is not None and not (type(us) in (int, float) and math.isfinite(us) and us > 0):
            raise ValueError(f"{name} took {us!r} microseconds in it")
        if not isinstance(config, dict) or not all(type(value) in (int, str, bool) for value in config.values()):
            raise ValueError(f"{name} has the config {config!r} in it")
        row[name] = Measured(us, config)
    return row


def _document(gpu: str, measured_with: Mapping[str, Any], rows: Mapping[Key, Row]) -> dict[str, Any]:
    return {
        "version": VERSION,
        "gpu": gpu,
        "measured_with": dict(measured_with),
        "rows": [
            {**key._asdict(), "kernels": {name: {"us": e.us, "config": dict(e.config)} for name, e in row.items()}}
            for key, row in rows.items()
        ],
    }


def _write(path: Path, document: Mapping[str, Any]) -> None:
    """Write a whole file under its final name, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@functools.cache
def _warn_of_unwritable_cache(folder: str, error: str) -> None:
    warnings.warn(
        f"the tuning cache {folder} cannot be written ({error}): each process measures again. Set SPARSEKIT_TUNING to "
        "a folder that can be, or to 'off'",
        stacklevel=4,
    )
