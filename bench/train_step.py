"""Time and memory of a training step: masked, with and without a teacher, against dense.

    python bench/train_step.py [--rounds 7] [--batch 4] [--length 256] [--hidden 768] [--layers 6] [--vocab 8192]
                               [--bf16]

Each side is a Trainer's own forward, backward and optimizer step, with clipping and the choice of masks every ten
steps as its loop has them, without its logging and its data loader; on one Llama of random weights. A round is ten
steps of each side in turn, so that each holds one choice of masks. Reported: minimum and median time of a step and
the ratio to dense; the bytes of parameters and of the optimizer's state; and the peak of the process's memory above
its start, each side in a process of its own. One row goes to bench/results.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import record
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sparsekit.report import Report
from sparsekit.train.ast_config import ASTConfig
from sparsekit.train.ast_trainer import ASTTrainer
from sparsekit.train.data import collate, training_samples

SIDES = {
    "dense": None,
    "masked": {"kd_weight": 0.0},
    "masked + teacher": {},
    "masked + teacher + slorb": {"slorb_group": 16, "slorb_init": "mean"},
}
STEPS = 10


def llama(options: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    hidden = options.hidden
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocab,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3 // 16 * 16,
            num_hidden_layers=options.layers,
            num_attention_heads=hidden // 64,
            max_position_embeddings=options.length,
        )
    )


def trainer_of(side: str, model: Any, chunks: list[Tensor], options: argparse.Namespace, folder: str) -> Any:
    shared: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": 10_000,
        "per_device_train_batch_size": options.batch,
        "learning_rate": 1e-4,
        "bf16": options.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "report_to": "none",
    }
    own = SIDES[side]
    if own is None:
        data = training_samples(chunks, model)
        args = TrainingArguments(**shared, remove_unused_columns=False, lr_scheduler_type="cosine")
        return Trainer(model=model, args=args, train_dataset=data, data_collator=collate)
    return ASTTrainer(model, ASTConfig(**shared, **own, start="magnitude"), chunks)


def stepper(trainer: Any) -> Callable[[], None]:
    """Return a function that does one optimizer step, as the Trainer's own loop does."""
    is_ours = isinstance(trainer, ASTTrainer)
    if is_ours:
        trainer._before_training(None)
    trainer.create_optimizer_and_scheduler(num_training_steps=10_000)
    model = trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
    trainer.state.max_steps, trainer.current_gradient_accumulation_steps = 10_000, 1
    if is_ours:
        trainer._begin()
    batches = iter(trainer.get_train_dataloader())
    inputs = [next(batches) for _ in range(4)]
    count = [0]

    def step() -> None:
        batch = dict(inputs[count[0] % len(inputs)])
        trainer.training_step(model, batch, batch["labels"][:, 1:].numel())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if is_ours:
            trainer._before_step()
        trainer.optimizer.step()
        model.zero_grad()
        trainer.state.global_step += 1
        count[0] += 1
        if is_ours:
            trainer._after_step()

    return step


def bytes_of(trainer: Any) -> dict[str, int]:
    def size(tensors: Any) -> int:
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    teacher = getattr(trainer, "teacher", None)
    return {
        "student": size(trainer.model.parameters()),
        "teacher": size(teacher.parameters()) if teacher is not None else 0,
        "optimizer": size(value for state in optimizer.state.values() for value in state.values()),
    }


def peak_memory(side: str, options: argparse.Namespace) -> int:
    """Return the bytes by which a process of its own grew over three steps."""
    command = [sys.executable, __file__, *options.given, "--only", side]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(found.split()[-1])


def run_alone(side: str, options: argparse.Namespace) -> None:
    start = memory("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        model = llama(options)
        step = stepper(trainer_of(side, model, chunks_for(options), options, folder))
        for _ in range(3):
            step()
    if torch.cuda.is_available():
        print(torch.cuda.max_memory_allocated())
    else:
        print(memory("VmHWM") - start)


def memory(which: str) -> int:
    """Return bytes of this process: "VmRSS" now, or "VmHWM" at most; `getrusage` would count the parent's peak, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(which)).split()[1])


def chunks_for(options: argparse.Namespace) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(0, options.vocab, (8 * options.batch, options.length), generator=generator))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("batch", 4), ("length", 256), ("hidden", 768), ("layers", 6), ("vocab", 8192), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--only", choices=list(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.given = sys.argv[1:]
    if options.only:
        run_alone(options.only, options)
        return
    dense = llama(options)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            side: trainer_of(side, copy.deepcopy(dense), chunks_for(options), options, folder) for side in SIDES
        }
        steps = {side: stepper(trainer) for side, trainer in trainers.items()}
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        for round_ in range(options.rounds + 1):
            for side, step in steps.items():
                started = time.perf_counter()
                for _ in range(STEPS):
                    step()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if round_:  # the first warms up
                    times[side].append((time.perf_counter() - started) / STEPS)
        sizes = {side: bytes_of(trainer) for side, trainer in trainers.items()}
    rows = []
    for side, found in times.items():
        ratios = [own / other for own, other in zip(found, times["dense"], strict=True)]
        rows.append(
            {
                "side": side,
                "ms a step, minimum": 1e3 * min(found),
                "median": 1e3 * statistics.median(found),
                "against dense": min(found) / min(times["dense"]),
                "median of the rounds' ratios": statistics.median(ratios),
                **{f"{name}, bytes": size for name, size in sizes[side].items()},
                "peak above start, bytes": peak_memory(side, options),
            }
        )
    Report("A training step", rows).print()
    shape = {name: getattr(options, name) for name in ("batch", "length", "hidden", "layers", "vocab", "bf16")}
    record("train_step", json.loads(json.dumps({**shape, "sides": rows})))


if __name__ == "__main__":
    main()
