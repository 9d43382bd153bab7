"""Trains a Hugging Face model on a text for some minutes, so that what it gains on text like that can be measured.

    python -m bench.finetune --model FOLDER --text train.jsonl.xz --seconds 3600 --out FOLDER

Documents in a random order, one stream cut into windows; AdamW on all weights, its rate rising over the first
twentieth of the time and falling to nothing along a cosine; products of matrices in bfloat16. The new folder holds the
model, its tokenizer, and finetune.json, which says how it was made.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

from slotfast.command.run import run_command
from slotfast.data import read_documents
from slotfast.errors import InputError
from slotfast.eval.inputs import Sources, read_inputs

from .common import provenance


def main() -> None:
    """Train, and write the new folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a causal language model of transformers")
    parser.add_argument("--text", required=True, help="documents to train on, as of slotfast eval")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of training")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a window")
    parser.add_argument("--batch", type=int, default=4, help="windows of a step")
    parser.add_argument("--lr", type=float, default=1e-4, help="highest rate")
    parser.add_argument("--out", required=True, help="folder that must not exist yet")
    run(parser.parse_args())


def run(options: argparse.Namespace) -> None:
    """Train and write; raises InputError on bad input."""
    from transformers import AutoTokenizer

    if Path(options.out).exists():
        raise InputError(f"--out {options.out}: it exists")
    inputs = read_inputs(Sources(model=options.model, text=options.text, max_tokens=64))
    model = inputs.artifact.model().module.requires_grad_(True).train()
    documents = list(read_documents(options.text))
    order = np.random.default_rng(0).permutation(len(documents))
    step = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.0)
    taken = options.batch * options.seq_len
    begun, count, seen, losses, ids = time.monotonic(), 0, 0, [], np.empty(0, np.int64)
    while (share := (time.monotonic() - begun) / options.seconds) < 1:
        while len(ids) < taken + 1:
            found = inputs.tokenizer.encode_documents([documents[order[count % len(order)]]])[0]
            ids, count = np.concatenate([ids, np.asarray(found, np.int64)]), count + 1
        stream, ids = torch.from_numpy(ids[: taken + 1]), ids[taken:]
        for group in step.param_groups:
            group["lr"] = options.lr * min(20 * share, 0.5 + 0.5 * math.cos(math.pi * share))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(stream[:-1].view(options.batch, -1), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), stream[1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step.step()
        step.zero_grad(set_to_none=True)
        seen += taken
        losses.append(loss.item())
        if len(losses) % 20 == 0:
            print(f"{share:.0%}, {seen} tokens, loss {np.mean(losses[-20:]):.3f}", file=sys.stderr, flush=True)
    made = {"model": Path(options.model).name, "text": Path(options.text).name, "trained_tokens": seen}
    made |= {name: getattr(options, name) for name in ("seconds", "seq_len", "batch", "lr")}
    made |= {"documents": count, "loss": float(np.mean(losses[-50:]))}
    model.save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
    Path(options.out, "finetune.json").write_text(json.dumps(made | provenance("cpu"), indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
