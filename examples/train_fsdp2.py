"""Fully sharded: every rank keeps a part of the table, of its gradient and of AdamW's state, and of each batch.

    torchrun --standalone --nproc-per-node 2 examples/train_fsdp2.py --text input.txt

FSDP gathers the table for each forward and backward pass, and shards the averaged gradient. The result is that of one
process on the whole batches, for any number of ranks.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import bigramx


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file; without one, the language reference of CPython")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64, help="sequences in a batch, of all ranks together")
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--eval-interval", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--out", type=Path, default=Path("model.safetensors"))
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    if args.batch_size % num_ranks != 0:
        raise SystemExit(f"expected --batch-size to be a multiple of {num_ranks}, the ranks; got {args.batch_size}")

    text = bigramx.data.read_text(args.text) if args.text else bigramx.data.default_text()
    tokenizer = bigramx.CharTokenizer.from_text(text)
    train_tokens, val_tokens = bigramx.data.split(tokenizer.encode(text))

    torch.manual_seed(args.seed)  # the same table on every rank, and the same batches, of which each takes its part
    model = bigramx.BigramLanguageModel(tokenizer.vocab_size).to(device)
    model.tokenizer = tokenizer
    fully_shard(model, mesh=init_device_mesh(device.type, (num_ranks,)))
    optimizer = bigramx.optim.AdamW(model.parameters(), lr=args.lr)

    for step in range(args.steps + 1):
        if step % args.eval_interval == 0 or step == args.steps:
            train_loss, val_loss = model.evaluate(train_tokens), model.evaluate(val_tokens)  # by all ranks together
            if rank == 0:
                print(f"step {step:4}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        if step < args.steps:
            batch = bigramx.data.get_batch(train_tokens, args.batch_size, args.block_size)
            idx, targets = (tokens.chunk(num_ranks)[rank].to(device) for tokens in batch)
            _no_logits, loss = model(idx, targets, return_logits=False)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    start = torch.zeros(1, 1, dtype=torch.long, device=device)
    sample = model.generate(start, 200)  # the same on every rank, whose generators have drawn the same batches
    model.save(args.out)  # the first rank writes the whole table
    if rank == 0:
        print(tokenizer.decode(sample[0]))
    dist.barrier()  # until the first rank has written
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
