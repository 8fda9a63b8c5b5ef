"""What a teacher says about the training data, on disk, so that no teacher is in memory while a student trains.

`write_teacher_cache` runs the teacher once and keeps the k likeliest tokens of each place; `CachedTeacher` reads them
back where the same tokens come again, in any order.

A cache is a folder of arrays that are mapped, not read: `ids` [tokens, k] and `log_probs` [tokens, k], the samples one
after the other, `offsets` [samples + 1] where each begins, `digests` [samples, 16] of their token ids; and
`teacher.json`. A place takes 4 k bytes with a vocabulary of up to 65536 tokens, else 6 k.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekit.errors import CheckpointError, NonFiniteError
from sparsekit.files import replace_dir
from sparsekit.progress import progress_bar
from sparsekit.train.data import Sample, TokenSamples, collate, training_samples
from sparsekit.train.distill import Head, TopK
from sparsekit.train.teachers import Teacher

FORMAT = 1
"""Version of the layout of a cache."""

_LOGITS_AT_ONCE = 1024
_ARRAYS = ("ids", "log_probs", "offsets", "digests")


def write_teacher_cache(
    model: nn.Module,
    dataset: Any,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    max_seq_length: int = 2048,
    top_k: int = 64,
    temperature: float = 2.0,
    batch_size: int = 8,
    progress: bool = True,
) -> "CachedTeacher":
    """Run a teacher over the training data and keep the likeliest tokens of each place; return the cache, open.

    Args:
        model: the teacher; it is left as it was.
        dataset: what the training is to read, text or tokens, see `training_samples`.
        folder: written beside and renamed into place; a cache that stands there is replaced.
        tokenizer: needed for text.
        max_seq_length: tokens of a sample of text, as in the training.
        top_k: tokens kept for each place (64 to 256); their probabilities do not depend on it.
        temperature: T of the distillation; probabilities are softmax(logits / T).
        batch_size: samples at a time.
        progress: show a bar.
    Raises:
        ValueError: no data, `top_k` larger than the vocabulary, or a number out of range.
        NonFiniteError: the teacher's logits hold NaN.
        OSError: too little space on the disk.
    """
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be above 0, as 2.0")
    samples = training_samples(dataset, model, tokenizer, max_seq_length)
    offsets = np.cumsum([0] + [len(samples[i]["input_ids"]) for i in range(len(samples))], dtype=np.int64)
    with _borrowed(model) as teacher:
        vocabulary = next(_logits(teacher.outputs(_batch(samples, range(1), model)))).shape[-1]
        if top_k > vocabulary:
            raise ValueError(f"top_k={top_k} of a vocabulary of {vocabulary} tokens: ask for at most that")
        id_dtype = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.int32)
        shape = (int(offsets[-1]), top_k)
        needed = math.prod(shape) * (id_dtype.itemsize + 2) + len(samples) * 24 + 4096
        with replace_dir(Path(folder), needed) as new:
            ids = np.lib.format.open_memmap(new / "ids.npy", "w+", id_dtype, shape)
            log_probs = np.lib.format.open_memmap(new / "log_probs.npy", "w+", np.float16, shape)
            with progress_bar("teacher", len(samples), progress) as bar:
                for start in range(0, len(samples), batch_size):
                    chosen = range(start, min(start + batch_size, len(samples)))
                    rows = slice(int(offsets[chosen.start]), int(offsets[chosen.stop]))
                    output = teacher.outputs(_batch(samples, chosen, model))
                    lengths = np.diff(offsets[chosen.start : chosen.stop + 1])
                    ids[rows], log_probs[rows] = _likeliest(output, lengths, top_k, temperature, start)
                    bar.advance(len(chosen))
            ids.flush()
            log_probs.flush()
            digests = np.stack([_digest(samples[i]["input_ids"]) for i in range(len(samples))])
            np.save(new / "offsets.npy", offsets)
            np.save(new / "digests.npy", digests)
            description = {
                "format": FORMAT,
                "architecture": type(model).__name__,
                "vocabulary": vocabulary,
                "temperature": float(temperature),
                "top_k": top_k,
                "num_samples": len(samples),
                "num_tokens": shape[0],
                "data_digest": hashlib.sha256(digests.tobytes()).hexdigest(),
            }
            (new / "teacher.json").write_text(json.dumps(description, indent=2) + "\n")
    return CachedTeacher(folder)


class CachedTeacher:
    """What a teacher said about some samples, from a folder that `write_teacher_cache` wrote.

    Attributes:
        vocabulary: tokens that the teacher knew.
        temperature: T of the probabilities.
        top_k: tokens kept for each place.
    Raises:
        CheckpointError: the folder is no cache, or a part is missing or truncated.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        description = _read_description(self.folder)
        self.vocabulary: int = description["vocabulary"]
        self.temperature: float = description["temperature"]
        self.top_k: int = description["top_k"]
        self._ids, self._log_probs, self._offsets, self._digests = _open_arrays(self.folder, description)
        self._index = {digest.tobytes(): index for index, digest in enumerate(self._digests)}

    def __reduce__(self) -> tuple[Any, ...]:  # a worker process maps the files again, rather than being sent them
        return CachedTeacher, (str(self.folder),)

    def __len__(self) -> int:
        return len(self._digests)

    def __getitem__(self, index: int) -> TopK:
        """Return the teacher's likeliest tokens at each place of sample `index`: ids int32, log_probs fp16, [L, k]."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a teacher cache of {len(self)}")
        rows = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        return TopK(
            torch.from_numpy(self._ids[rows].astype(np.int32)), torch.from_numpy(np.array(self._log_probs[rows]))
        )

    def find(self, input_ids: Tensor) -> int:
        """Return the index of the sample with these tokens [L].

        Raises:
            ValueError: the teacher has not seen them.
        """
        found = self._index.get(_digest(input_ids).tobytes())
        if found is None:
            raise ValueError(f"the teacher cache {self.folder} does not hold the {input_ids.numel()} tokens asked for")
        return found

    def attach(self, dataset: TokenSamples, temperature: float, vocabulary: int | None = None) -> "TaughtSamples":
        """Return the samples with `teacher_ids` and `teacher_log_probs` [L, k] in each.

        Args:
            dataset: samples of the data that the cache was made from, in any order, some or all.
            temperature: T of the loss.
            vocabulary: tokens that the student knows; None leaves it unchecked.
        Raises:
            ValueError: the cache was made at another temperature, with another vocabulary, or from other tokens.
        """
        if temperature != self.temperature:
            raise ValueError(
                f"the teacher cache {self.folder} holds probabilities at temperature {self.temperature:g}, and "
                f"{temperature:g} is asked for: write it again with temperature={temperature:g}, or train with its own"
            )
        if vocabulary is not None and vocabulary != self.vocabulary:
            raise ValueError(
                f"the teacher of {self.folder} knew {self.vocabulary} tokens, the student knows {vocabulary}: "
                "distillation needs a teacher with the same tokenizer"
            )
        places = [self._index.get(_digest(dataset[i]["input_ids"]).tobytes()) for i in range(len(dataset))]
        if None in places:
            raise ValueError(
                f"the teacher cache {self.folder} was made from other data: {places.count(None)} of {len(dataset)} "
                f"samples are not in it, the first is sample {places.index(None)}. Write it again from this dataset, "
                "with the same tokenizer and max_seq_length"
            )
        return TaughtSamples(dataset, self, [place for place in places if place is not None])


class TaughtSamples(TokenSamples):
    """Samples, each with what the teacher said about it; made by `CachedTeacher.attach`."""

    def __init__(self, dataset: TokenSamples, cache: CachedTeacher, places: list[int]) -> None:
        super().__init__(dataset.samples)
        self.cache, self.places = cache, places

    def __getitem__(self, index: int) -> Sample:
        taught = self.cache[self.places[index]]
        return {**super().__getitem__(index), "teacher_ids": taught.ids, "teacher_log_probs": taught.log_probs}


@contextmanager
def _borrowed(model: nn.Module) -> Iterator[Teacher]:
    """Make a teacher of a model that has its own modes and gradients back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield Teacher(model)
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)


def _batch(samples: TokenSamples, chosen: range, model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in collate([samples[i] for i in chosen]).items()}


def _logits(output: Head | Tensor) -> Iterator[Tensor]:
    """Yield logits [m, V] of successive places."""
    if isinstance(output, Tensor):
        yield from output.flatten(0, -2).split(_LOGITS_AT_ONCE)
        return
    for rows in output.hidden.flatten(0, -2).split(_LOGITS_AT_ONCE):
        yield output.head(rows)


@torch.no_grad()
def _likeliest(
    output: Head | Tensor, lengths: np.ndarray, top_k: int, temperature: float, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and log-probabilities [tokens, k] of a batch of samples from `first` on, without their padding."""
    found = [torch.log_softmax(logits.float() / temperature, -1).topk(top_k) for logits in _logits(output)]
    padded = torch.arange(int(lengths.max())) >= torch.from_numpy(lengths)[:, None]
    kept = ~padded.flatten()
    log_probs = torch.cat([each.values for each in found]).cpu()[kept]
    if log_probs.isnan().any():
        raise NonFiniteError(
            f"the teacher's logits hold NaN or infinity in samples {first} to {first + len(lengths) - 1}: mend the "
            "model, or run it in bf16 rather than fp16"
        )
    return torch.cat([each.indices for each in found]).cpu()[kept].numpy(), log_probs.numpy()


def _digest(input_ids: Tensor) -> np.ndarray:
    """Return 16 bytes that stand for the tokens of a sample."""
    tokens = input_ids.detach().to("cpu", torch.int64).contiguous().numpy()
    return np.frombuffer(hashlib.blake2b(tokens.tobytes(), digest_size=16).digest(), np.uint8)


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / "teacher.json"
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: {folder} is no teacher cache, `sparsekit train cache` or write_teacher_cache makes one"
        )
    try:
        description = json.loads(path.read_text())
        version = description["format"]
        numbers = [description[name] for name in ("vocabulary", "temperature", "top_k", "num_samples", "num_tokens")]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): write the cache again") from error
    if version != FORMAT or not all(isinstance(number, int | float) and number > 0 for number in numbers):
        raise CheckpointError(f"{path} is of layout {version}, this version reads {FORMAT}: write the cache again")
    return description


def _open_arrays(folder: Path, description: dict[str, Any]) -> list[np.ndarray]:
    samples, tokens, top_k = (description[name] for name in ("num_samples", "num_tokens", "top_k"))
    shapes = [(tokens, top_k), (tokens, top_k), (samples + 1,), (samples, 16)]
    arrays = []
    for name, shape in zip(_ARRAYS, shapes, strict=True):
        path = folder / f"{name}.npy"
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is missing or truncated ({error}): write the cache again") from error
        if array.shape != shape:
            raise CheckpointError(f"{path} is {array.shape}, teacher.json says {shape}: write the cache again")
        arrays.append(array)
    return arrays
