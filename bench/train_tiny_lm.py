"""Train the demo's small Llama again, from a text file.

    python bench/train_tiny_lm.py --train train.txt --valid valid.txt --out DIR [--max-steps 2540]

Each line of the text is one document, closed by `</s>`. A byte-level BPE of 4096 tokens is trained on the text first,
then the Llama of `demo/wikilm/config.json` on chunks of 256 tokens, 24 at a time, with the schedule of its card: AdamW
(0.9, 0.95), learning rate 3e-3, 3 % warm-up, constant to half, cosine to 2 %, weight decay 0.1 on matrices, clipping at
1.0, bf16 autocast. On the training split of WikiText-2 (2,540 steps, 55 minutes on 2 cores) it ends at a perplexity of
29.5 on valid. The folder appears when training is done, and not before.
"""

import argparse
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from sparsekit.evaluate import perplexity, read_documents, read_tokens
from sparsekit.files import replace_dir

CONFIG = Path(__file__).resolve().parents[1] / "demo" / "wikilm" / "config.json"
CHUNK, WARM_UP, CONSTANT_UNTIL, FLOOR = 256, 0.03, 0.5, 0.02


def train_tokenizer(text: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of this text, `<s>` being 0 and `</s>` 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    tokenizer.train_from_iterator(read_documents(text), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


class Chunks(Dataset[dict[str, Tensor]]):
    """A stream of tokens cut into chunks that do not overlap; the Trainer shuffles them anew in each epoch."""

    def __init__(self, ids: Tensor) -> None:
        if ids.numel() < CHUNK:
            raise ValueError(f"the text has {ids.numel()} tokens, and one chunk takes {CHUNK}: pass more text")
        self.chunks = ids[: ids.numel() // CHUNK * CHUNK].view(-1, CHUNK)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.chunks[index], "labels": self.chunks[index]}


def learning_rate_factor(step: int, max_steps: int) -> float:
    """Return the share of the peak learning rate: linear warm-up, constant to half, cosine down to the floor."""
    done = step / max(max_steps, 1)
    if done < WARM_UP:
        return (step + 1) / max(1, math.ceil(WARM_UP * max_steps))
    if done < CONSTANT_UNTIL:
        return 1.0
    left = (done - CONSTANT_UNTIL) / (1 - CONSTANT_UNTIL)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(left, 1.0)))


def optimizer_of(model: nn.Module, learning_rate: float, max_steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
    return optimizer, LambdaLR(optimizer, lambda step: learning_rate_factor(step, max_steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--valid", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-steps", type=int, default=2540)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-bf16", action="store_true", help="train in fp32, where bf16 is emulated")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    tokenizer = train_tokenizer(options.train, options.vocab_size)
    config = LlamaConfig.from_pretrained(CONFIG)
    config.vocab_size, config.dtype = len(tokenizer), torch.float32
    model = LlamaForCausalLM(config).float()
    data = Chunks(read_tokens(options.train, tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(data):,} chunks of {CHUNK} tokens")
    with replace_dir(options.out, bytes_needed=200 << 20) as folder:
        arguments = TrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=options.max_steps,
            per_device_train_batch_size=options.batch_size,
            max_grad_norm=1.0,
            bf16=not options.no_bf16,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=max(1, min(50, options.max_steps // 10)),
            save_strategy="no",
            report_to=[],
            seed=options.seed,
        )
        optimizers = optimizer_of(model, options.learning_rate, options.max_steps)
        Trainer(model=model, args=arguments, train_dataset=data, optimizers=optimizers).train()
        if options.valid is not None:
            found = perplexity(model, options.valid, tokenizer, max_seq_length=CHUNK)
            print(f"perplexity on {options.valid.name}: {found.value:.2f}")
        shutil.rmtree(folder / "trainer", ignore_errors=True)
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
