"""The lecture's training script, in our own writing: only the import of the model differs.

    python benchmarks/lecture.py --model reference --data input.txt --seed 1337
    python benchmarks/lecture.py --model bigramx   --data input.txt --seed 1337

Both print the same losses and the same text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

batch_size = 32
block_size = 8
eval_iters = 200
eval_interval = 300
learning_rate = 1e-2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["reference", "bigramx"], default="bigramx")
    parser.add_argument("--data", type=Path, required=True, help="a UTF-8 text")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args()

    if arguments.model == "bigramx":
        from bigramx import BigramLanguageModel
    else:
        from bigramx.reference import BigramLanguageModel  # type: ignore[assignment]

    torch.manual_seed(arguments.seed)
    text = arguments.data.read_text(encoding="utf-8")
    chars = sorted(set(text))
    vocab_size = len(chars)
    stoi = {ch: i for i, ch in enumerate(chars)}
    itos = dict(enumerate(chars))

    def decode(tokens: list[int]) -> str:
        return "".join(itos[i] for i in tokens)

    data = torch.tensor([stoi[c] for c in text], dtype=torch.long)
    n = int(0.9 * len(data))
    splits = {"train": data[:n], "val": data[n:]}

    def get_batch(split: str) -> tuple[Tensor, Tensor]:
        data = splits[split]
        ix = torch.randint(len(data) - block_size, (batch_size,))
        x = torch.stack([data[i : i + block_size] for i in ix])
        y = torch.stack([data[i + 1 : i + block_size + 1] for i in ix])
        return x, y

    model = BigramLanguageModel(vocab_size)

    @torch.no_grad()
    def estimate_loss() -> dict[str, float]:
        out = {}
        model.eval()
        for split in splits:
            losses = torch.zeros(eval_iters)
            for k in range(eval_iters):
                _logits, loss = model(*get_batch(split))
                losses[k] = loss.item()
            out[split] = losses.mean().item()
        model.train()
        return out

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for step in range(arguments.steps):
        if step % eval_interval == 0:
            losses = estimate_loss()
            print(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        xb, yb = get_batch("train")
        _logits, loss = model(xb, yb)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    losses = estimate_loss()
    print(f"step {arguments.steps}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")

    print(decode(model.generate(idx=torch.zeros((1, 1), dtype=torch.long), max_new_tokens=500)[0].tolist()))


if __name__ == "__main__":
    main()
