"""How good a language model is on text: perplexity per token, and how fast it read the text.

perplexity = exp( sum over predicted tokens of -log p(token | tokens before it in its chunk) / their number )

The documents are tokenised without special tokens and joined, each closed by the tokenizer's end-of-text token; the
stream is cut into chunks of `max_seq_length` that do not overlap, and every token but the first of each chunk is
predicted once. As in the published codes, what is left after the last whole chunk is not read, unless it is all there
is. A line of a .txt file is a document, blank lines too: WikiText is read so.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.progress import progress_bar
from sparsekit.report import Report

DEFAULT_CHUNK = 2048
_LOGITS_BYTES = 256 << 20


@dataclass(frozen=True)
class Perplexity:
    """What `perplexity` found.

    Attributes:
        value: perplexity per predicted token.
        num_tokens: tokens read, in whole chunks.
        num_predicted: tokens predicted: all but the first of each chunk.
        seconds: time in the model.
        max_seq_length: length of a chunk.
    """

    value: float
    num_tokens: int
    num_predicted: int
    seconds: float
    max_seq_length: int

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    def __float__(self) -> float:
        return self.value

    def to_dict(self) -> dict[str, float]:
        return {
            "perplexity": self.value,
            "tokens_per_second": self.tokens_per_second,
            "num_tokens": self.num_tokens,
            "max_seq_length": self.max_seq_length,
            "seconds": self.seconds,
        }

    def report(self, title: str = "Perplexity") -> Report:
        finite = math.isfinite(self.value)
        notes = [] if finite else ["the model's loss is not finite: its weights or activations hold NaN or infinity"]
        return Report(title, summary=dict(self.to_dict()), notes=notes, ok=finite)


def perplexity(
    model: nn.Module,
    dataset: Any,
    tokenizer: Any = None,
    *,
    max_seq_length: int | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """Return the perplexity of a causal language model on all of `dataset`; cross entropy is summed in fp32.

    Args:
        model: takes `input_ids` [B, T] and returns an object with `logits` [B, T, V].
        dataset: a path to .txt, .jsonl or .parquet, strings, token tensors, or anything that yields one of these or
            {"text": ...} or {"input_ids": ...}.
        tokenizer: needed where the dataset is text.
        max_seq_length: tokens of a chunk; None takes 2048, or what the model was made for where that is less.
        batch_size: chunks at a time; None fits the logits into 256 MB.
        max_tokens: read no more than this many; None reads all.
        progress: show a bar.

    Raises:
        ValueError: no text, no tokenizer for text, or chunks the model cannot read.
    """
    chunk = _chunk_length(model, max_seq_length)
    ids = read_tokens(dataset, tokenizer)[:max_tokens]
    if ids.numel() < 2:
        raise ValueError(f"the dataset holds {ids.numel()} tokens: perplexity needs at least 2")
    chunk = min(chunk, ids.numel())
    ids = ids[: ids.numel() // chunk * chunk]
    vocabulary = int(getattr(_text_config(model), "vocab_size", 0) or 1)
    if vocabulary > 1 and int(ids.max()) >= vocabulary:
        raise ValueError(f"token {int(ids.max())} is outside the model's vocabulary of {vocabulary}: wrong tokenizer?")
    batch_size = batch_size or max(1, min(4096, _LOGITS_BYTES // (4 * vocabulary)) // chunk)
    device = next(model.parameters()).device
    total, predicted, seconds = 0.0, 0, 0.0
    with torch.inference_mode(), _evaluating(model), progress_bar("perplexity", ids.numel(), progress) as bar:
        for batch in ids.view(-1, chunk).split(batch_size):
            started = time.perf_counter()
            total += _loss(model, batch.to(device))
            seconds += time.perf_counter() - started
            predicted += batch[:, 1:].numel()
            bar.advance(batch.numel(), f"ppl {_exp(total / predicted):.2f}")
    return Perplexity(_exp(total / predicted), ids.numel(), predicted, seconds, chunk)


def read_tokens(dataset: Any, tokenizer: Any = None) -> Tensor:
    """Return the whole dataset as one stream of token ids [T], documents closed by the end-of-text token."""
    pieces: list[Tensor] = []
    texts: list[str] = []
    for item in read_documents(dataset):
        if isinstance(item, str):
            texts.append(item)
        else:
            pieces.append(torch.as_tensor(item, dtype=torch.int64).reshape(-1))
    if texts:
        if tokenizer is None:
            raise ValueError("the dataset is text: pass the model's tokenizer, or token tensors")
        # One call for all: fast tokenizers spread a list over the cores.
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        pieces += [torch.tensor([*ids, *end], dtype=torch.int64) for ids in encoded]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


def read_documents(dataset: Any) -> Iterator[Any]:
    """Yield each document of a dataset, as a string or as token ids.

    Raises:
        FileNotFoundError: a path without a file.
        ValueError: something that is neither text nor tokens.
    """
    if isinstance(dataset, str | os.PathLike):
        yield from _read_file(Path(dataset))
        return
    if isinstance(dataset, Tensor):
        yield dataset
        return
    if not isinstance(dataset, Iterable):
        raise ValueError(f"dataset is a {type(dataset).__name__}: pass a path, strings, or token tensors")
    for item in dataset:
        yield _document(item)


def _document(item: Any) -> Any:
    if isinstance(item, str | Tensor):
        return item
    if hasattr(item, "get"):  # dict, BatchEncoding
        for key in ("text", "input_ids"):
            if item.get(key) is not None:
                return item[key]
        raise ValueError(f"a sample holds {sorted(item)}: it needs 'text' or 'input_ids'")
    if isinstance(item, list | tuple) and all(isinstance(token, int) for token in item):
        return item
    raise ValueError(f"a sample is a {type(item).__name__}: pass strings, token ids, or dicts with 'text'")


def _read_file(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no dataset at {path}: pass a .txt, .jsonl or .parquet file")
    if path.suffix in (".jsonl", ".json"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                try:
                    yield _document(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from error
    elif path.suffix == ".parquet":
        import pandas

        for record in pandas.read_parquet(path).to_dict("records"):
            yield _document(record)
    else:
        text = path.read_text(encoding="utf-8")
        yield from text.removesuffix("\n").split("\n") if text else []


def _chunk_length(model: nn.Module, asked: int | None) -> int:
    limit = getattr(_text_config(model), "max_position_embeddings", None)
    if asked is None:
        return min(DEFAULT_CHUNK, limit or DEFAULT_CHUNK)
    if asked < 2:
        raise ValueError(f"max_seq_length={asked}: a chunk needs at least 2 tokens")
    if limit and asked > limit:
        raise ValueError(f"max_seq_length={asked}, and the model reads {limit} positions: ask for at most that")
    return asked


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _loss(model: nn.Module, batch: Tensor) -> float:
    """Summed cross entropy of all tokens but the first of each chunk."""
    logits = model(input_ids=batch).logits[:, :-1]
    return sum(
        F.cross_entropy(row_logits.float(), row[1:], reduction="sum").item()
        for row_logits, row in zip(logits, batch, strict=True)
    )


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; each module's own mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
