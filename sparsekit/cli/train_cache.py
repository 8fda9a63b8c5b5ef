"""`sparsekit train cache`: what the teacher says about the training text, on disk."""

from dataclasses import dataclass
from pathlib import Path

from sparsekit.cli.models import hush_warnings, load_model, load_tokenizer, need_file, need_model, need_writable
from sparsekit.cli.output import Output
from sparsekit.report import Report
from sparsekit.train.teacher_cache import CachedTeacher, write_teacher_cache

SAMPLES_LOOKED_AT = 64


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """The options of the command, by their names."""

    model: str
    folder: str
    dataset: str
    top_k: int
    temperature: float
    max_seq_length: int
    batch_size: int
    dtype: str
    device: str | None

    def check(self) -> None:
        """Raise ValueError or FileNotFoundError for what can be seen to be wrong before a model is loaded."""
        need_file(self.dataset, "--dataset")
        need_writable(self.folder, "DIR")
        need_model(self.model)


def run_train_cache(options: CacheOptions, output: Output) -> None:
    """Run the teacher over the text once, write the cache, and say what it takes and holds."""
    options.check()
    if output.is_silent:
        hush_warnings()
    tokenizer = load_tokenizer(options.model)
    model, notes = load_model(options.model, options.dtype, options.device)
    cache = write_teacher_cache(
        model,
        options.dataset,
        options.folder,
        tokenizer=tokenizer,
        max_seq_length=options.max_seq_length,
        top_k=options.top_k,
        temperature=options.temperature,
        batch_size=options.batch_size,
        progress=output.progress,
    )
    output.add("cache", cache_report(cache, options, notes))


def cache_report(cache: CachedTeacher, options: CacheOptions, notes: list[str]) -> Report:
    """Return the sizes of a cache, and how much of the teacher's probability it holds."""
    num_bytes = sum(file.stat().st_size for file in Path(options.folder).iterdir())
    num_tokens = sum(len(cache[index].ids) for index in range(len(cache)))
    looked_at = range(min(len(cache), SAMPLES_LOOKED_AT))
    held = [cache[index].log_probs.float().exp().sum(-1).mean().item() for index in looked_at]
    summary = {
        "samples": len(cache),
        "tokens": num_tokens,
        "tokens kept for each place": cache.top_k,
        "temperature": cache.temperature,
        "probability that they hold, mean": sum(held) / len(held),
        "on disk, bytes": num_bytes,
        "bytes for each token": round(num_bytes / num_tokens, 1),
    }
    train = (
        f"train with: sparsekit train ast {options.model} OUT --dataset {options.dataset} --teacher-cache "
        f"{options.folder} --max-seq-length {options.max_seq_length} --temperature {cache.temperature:g} --tokens N"
    )
    return Report(f"Teacher cache in {options.folder}", summary=summary, notes=[*notes, train])
