"""Row-sharded: each rank has some rows of the table, of their gradient and of AdamW's state, and they never leave it.

    torchrun --standalone --nproc-per-node 2 examples/train_row_sharded.py --text input.txt
    torchrun ... examples/train_row_sharded.py --tokens train.bin --vocab-size 50257

The table may be larger than the memory of any rank. In a step the ranks exchange the tokens of the batch, of which each
takes a part, and one sum of losses. The result is that of one process on the whole batches, for any number of ranks.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, zeros

import bigramx


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file; without one, the language reference of CPython")
    parser.add_argument("--tokens", type=Path, help="in place of a text, nanoGPT's .bin")
    parser.add_argument("--vocab-size", type=int, default=50257, help="of the tokens")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64, help="sequences in a batch, of all ranks together")
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--eval-interval", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--out", type=Path, default=Path("checkpoint"), help="a folder, into which each rank writes")
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
    mesh = init_device_mesh(device.type, (num_ranks,))

    tokenizer = None
    if args.tokens:
        tokens, vocab_size = bigramx.data.read_bin(args.tokens), args.vocab_size
    else:
        text = bigramx.data.read_text(args.text) if args.text else bigramx.data.default_text()
        tokenizer = bigramx.CharTokenizer.from_text(text)
        tokens, vocab_size = tokenizer.encode(text), tokenizer.vocab_size
    train_tokens, val_tokens = bigramx.data.split(tokens)

    with torch.device("meta"):  # without memory
        model = bigramx.BigramLanguageModel(vocab_size)
    table = zeros(vocab_size, vocab_size, device_mesh=mesh, placements=[Shard(0)])  # uniform; the loss is convex
    model.token_embedding_table.weight = torch.nn.Parameter(table)
    optimizer = bigramx.optim.AdamW(model.parameters(), lr=args.lr)

    torch.manual_seed(args.seed)  # the same batches on every rank, of which each takes its part
    for step in range(args.steps + 1):
        if step % args.eval_interval == 0 or step == args.steps:
            train_loss, val_loss = model.evaluate(train_tokens), model.evaluate(val_tokens)  # by all ranks together
            if rank == 0:
                print(f"step {step:4}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        if step < args.steps:
            batch = bigramx.data.get_batch(train_tokens, args.batch_size, args.block_size)
            parts = (tokens.chunk(num_ranks)[rank].to(device) for tokens in batch)
            idx, targets = (DTensor.from_local(part, mesh, [Shard(0)]) for part in parts)
            _no_logits, loss = model(idx, targets, return_logits=False)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    sample = model.generate(torch.zeros(1, 1, dtype=torch.long, device=device), 200)  # the same on every rank
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=args.out)  # type: ignore[attr-defined]
    if rank == 0:
        print(tokenizer.decode(sample[0]) if tokenizer else sample[0].tolist())
    dist.barrier()  # until the first rank has written
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
