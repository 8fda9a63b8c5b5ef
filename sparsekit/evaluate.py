"""How good a language model is on text: perplexity per token, and how fast it read the text.

perplexity = exp( sum over predicted tokens of -log p(token | tokens before it in its chunk) / their number )

The documents are tokenised without special tokens and joined, each closed by the tokenizer's end-of-text token; the
stream is cut into chunks of `max_seq_length` that do not overlap, and every token but the first of each chunk is
predicted once. As in the published codes, what is left after the last whole chunk is not read, unless it is all there
is. A dataset is whatever calibration takes, read by the same code: a line of a .txt file is a document, blank lines
too, as in WikiText.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.benchmarking.machine import device_of
from sparsekit.calibration.samples import INPUT, _as_batch, _open
from sparsekit.calibration.text import _checked, _token_stream
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
        model: takes `input_ids` [B, T] and returns an object with `logits` [B, T, V]; logits at a place must not see
            the tokens after it.
        dataset: what `prune_` takes: a path to .txt, .jsonl or .parquet, strings, token tensors, a `datasets.Dataset`,
            a DataLoader, or anything that yields one of these or {"text": ...} or {"input_ids": ...}.
        tokenizer: needed where the dataset is text.
        max_seq_length: tokens of a chunk; None takes 2048, or what the model was made for where that is less.
        batch_size: chunks at a time; None fits the logits into 256 MB.
        max_tokens: read no more than this many; None reads all.
        progress: show a bar.

    Raises:
        ValueError: no text, no tokenizer for text, chunks the model cannot read, or a model that does not predict the
            next token, as an encoder.
    """
    _check_number("max_seq_length", max_seq_length, least=2)
    _check_number("batch_size", batch_size, least=1)
    _check_number("max_tokens", max_tokens, least=2)
    _refuse_unless_causal(model)
    chunk = _chunk_length(model, max_seq_length)
    ids = read_tokens(dataset, tokenizer)[:max_tokens]
    if ids.numel() < 2:
        raise ValueError(f"the dataset holds {ids.numel()} tokens: perplexity needs at least 2")
    chunk = min(chunk, ids.numel())
    ids = ids[: ids.numel() // chunk * chunk]
    vocabulary = int(getattr(_text_config(model), "vocab_size", 0) or 1)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary > 1 and high >= vocabulary):
        raise ValueError(f"tokens from {low} to {high} for a vocabulary of {vocabulary}: wrong tokenizer?")
    batch_size = batch_size or max(1, min(4096, _LOGITS_BYTES // (4 * vocabulary)) // chunk)
    device = device_of(model)
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
    """Return the whole dataset as one stream of token ids [T], documents closed by the end-of-text token.

    Raises:
        FileNotFoundError: a path without a file.
        ValueError: neither text nor tokens, or text without a tokenizer.
    """
    first, items, _ = _open(dataset)
    if isinstance(first, str):
        if tokenizer is None:
            raise ValueError("the dataset is text: pass the model's tokenizer, or token tensors")
        return _token_stream(_checked(items), tokenizer, None).long()
    return torch.cat([_token_ids(item) for item in items])


def read_documents(dataset: Any) -> Iterator[Any]:
    """Return the documents of any dataset that calibration takes, each a string or what holds its token ids."""
    return _open(dataset)[1]


def _token_ids(item: Any) -> Tensor:
    """Return the tokens of one item [T], without padding."""
    batch = _as_batch(item)
    ids, mask = batch.get("input_ids", batch.get(INPUT)), batch.get("attention_mask")
    if ids is None or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"a sample holds {sorted(batch)}: perplexity needs 'text', or whole numbers as 'input_ids'")
    return (ids if mask is None else ids[mask.bool()]).reshape(-1).to("cpu", torch.int64)


def _chunk_length(model: nn.Module, asked: int | None) -> int:
    limit = getattr(_text_config(model), "max_position_embeddings", None)
    if asked is None:
        return min(DEFAULT_CHUNK, limit or DEFAULT_CHUNK)
    if limit and asked > limit:
        raise ValueError(f"max_seq_length={asked}, and the model reads {limit} positions: ask for at most that")
    return asked


def _check_number(name: str, value: Any, least: int) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


def _refuse_unless_causal(model: nn.Module) -> None:
    """Raise where a transformers model sees the tokens that it should foresee, or has no language head."""
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or type(model).__name__.endswith("ForCausalLM"):
        return
    is_seq2seq = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if is_seq2seq or not can_generate():
        raise ValueError(
            f"{type(model).__name__} is no causal language model: perplexity needs one that predicts each token from "
            "those before it, as AutoModelForCausalLM loads"
        )


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
