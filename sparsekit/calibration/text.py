"""Text to token samples.

A causal model is calibrated on random chunks of one long stream, the documents joined by the end-of-text token: every
position of every sample is a real token, as in its training. An encoder reads one text at a time, between its special
tokens, so it gets that. Neither is ever padded.
"""

from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]

_TEXTS_AT_ONCE = 512


def text_samples(
    texts: Iterable[Any], model: nn.Module, tokenizer: Any, *, num_samples: int, length: int, seed: int, read_all: bool
) -> tuple[list[Batch], int | None]:
    """Return samples as dicts of [1, L] tensors, and how many places of the stream they cover; None without a stream.

    Args:
        texts: strings. Blank ones count in a stream, as they did when the model read WikiText in training.
        model: what it is for decides between chunks of a stream and single texts.
        tokenizer: a transformers tokenizer, or anything with `encode(text)`.
        num_samples: chunks to draw, or texts to take.
        length: tokens of a chunk; the most of a text.
        seed: of the draw.
        read_all: False for a stream without end: read only twice what is needed.
    """
    if tokenizer is None:
        raise ValueError(
            "dataset holds text, which needs a tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...)"
        )
    generator = torch.Generator().manual_seed(seed)
    if _reads_single_texts(model, tokenizer):
        texts = (text for text in _checked(texts) if text.strip())
        return _single_texts(texts, tokenizer, num_samples, length, generator, read_all), None
    enough = None if read_all else 2 * num_samples * length
    return _random_chunks(_token_stream(_checked(texts), tokenizer, enough), num_samples, length, generator)


def _reads_single_texts(model: nn.Module, tokenizer: Any) -> bool:
    has_both = (
        getattr(tokenizer, "cls_token_id", None) is not None and getattr(tokenizer, "sep_token_id", None) is not None
    )
    is_causal = type(model).__name__.endswith("ForCausalLM") or bool(
        getattr(getattr(model, "config", None), "is_decoder", 0)
    )
    return has_both and not is_causal


def _checked(texts: Iterable[Any]) -> Iterator[str]:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"item {index} of the dataset is a {type(text).__name__} among strings: pass strings only")
        yield text


def _token_stream(texts: Iterator[str], tokenizer: Any, enough: int | None) -> Tensor:
    """Return all texts as one stream of token ids, int32."""
    eos = getattr(tokenizer, "eos_token_id", None)
    ids = array("i")  # a list takes nine times the memory, and a corpus to train on may have billions
    batch: list[str] = []
    is_blank = True
    for text in texts:
        is_blank = is_blank and not text.strip()
        batch.append(text)
        if len(batch) == _TEXTS_AT_ONCE:
            ids.extend(_encode_all(batch, tokenizer, eos))
            batch = []
        if enough is not None and len(ids) >= enough:
            break
    ids.extend(_encode_all(batch, tokenizer, eos))
    return torch.from_numpy(np.frombuffer(ids, np.int32)[: 0 if is_blank else None])


def _encode_all(texts: list[str], tokenizer: Any, eos: int | None) -> list[int]:
    end = [] if eos is None else [int(eos)]
    if not texts:
        return []
    if callable(tokenizer):
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        encoded = [_ids(tokenizer.encode(text)) for text in texts]
    return [token for one in encoded for token in [*one, *end]]


def _ids(encoded: Any) -> list[int]:
    return list(getattr(encoded, "ids", encoded))


def _random_chunks(
    stream: Tensor, num_samples: int, length: int, generator: torch.Generator
) -> tuple[list[Batch], int]:
    if stream.numel() < length:
        raise ValueError(
            f"the dataset gave {stream.numel()} tokens, and one sample takes {length}: "
            f"pass more text, or a max_seq_length of at most {stream.numel()}"
        )
    starts = torch.randint(0, stream.numel() - length + 1, (num_samples,), generator=generator)
    is_covered = torch.zeros(stream.numel(), dtype=torch.bool)
    for start in starts.tolist():
        is_covered[start : start + length] = True
    chunks = [{"input_ids": stream[start : start + length][None].long()} for start in starts.tolist()]
    return chunks, int(is_covered.sum())


def _single_texts(
    texts: Iterator[str], tokenizer: Any, num_samples: int, length: int, generator: torch.Generator, read_all: bool
) -> list[Batch]:
    pool = [text for text, _ in zip(texts, range(2 * num_samples), strict=False)] if not read_all else list(texts)
    if not pool:
        raise ValueError("the dataset gave 0 tokens: at least one text that is not blank is needed")
    chosen = sorted(torch.randperm(len(pool), generator=generator)[:num_samples].tolist())
    samples = []
    for index in chosen:
        encoded = tokenizer(pool[index], truncation=True, max_length=length, return_tensors="pt")
        samples.append({key: encoded[key] for key in ("input_ids", "token_type_ids") if key in encoded})
    return samples
