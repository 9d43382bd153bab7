"""python -m slotfast.train: train a model and write its int6 artifact."""

import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydantic
import sentencepiece
import torch
from torch import Tensor
from tqdm import tqdm

from . import config, corpus
from .artifact import Artifact, write_artifact
from .command import run
from .data import Tokenizer, atomic_write, check_writable, read_documents
from .errors import InputError
from .model import GPT, GPTConfig
from .optim import Muon

# A bar on a terminal, nothing elsewhere: `train` then prints plain lines.
_BAR = {"disable": None, "file": sys.stderr, "leave": False}
_HELD_OUT_EVERY = 32  # every 32nd document measures the training and is not learned from


def main(argv: list[str] | None = None) -> None:
    """Train, quantise, write; raises InputError on bad input."""
    settings, sources = config.load(config.TrainSettings, "python -m slotfast.train", __doc__, argv)
    config.warn_unread_variables()
    if settings.show_config:
        print(config.show(settings, sources))
        return
    torch.manual_seed(settings.seed)
    out = Path(settings.out)
    tokenizer_path = Path(settings.tokenizer or out.with_suffix(".model"))
    check_writable(out)
    if out == tokenizer_path:
        raise InputError(f"--out {out}: the tokenizer is written there; choose another suffix")
    model_config = _model_config(settings)
    documents = list(_documents(settings.text))
    np.random.default_rng(settings.seed).shuffle(documents)
    learned = [text for i, text in enumerate(documents) if i % _HELD_OUT_EVERY]
    held_out = [text for i, text in enumerate(documents) if i % _HELD_OUT_EVERY == 0]
    if not learned:
        raise InputError(f"{len(documents)} documents: too few to hold one out and learn from the rest")
    if settings.tokenizer is None:
        train_tokenizer(learned, settings.vocab_size, tokenizer_path)
    tokenizer = Tokenizer(tokenizer_path)
    model_config = model_config.model_copy(update={"vocab_size": tokenizer.vocab_size})
    tokens, _ = tokenizer.encode_documents(learned)
    test_tokens, test_bytes = tokenizer.encode_documents(held_out)
    if not test_bytes.rule:
        raise InputError("the documents that are held out to measure the training are empty: give more text")
    if len(tokens) <= settings.seq_len:
        raise InputError(f"{len(tokens)} tokens of text; one training window needs {settings.seq_len + 1}")
    model = GPT(model_config)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(learned):,} documents, {len(tokens):,} "
        f"tokens; {len(held_out)} documents held out",
        flush=True,
    )
    stream = torch.from_numpy(tokens.astype(np.int64))
    dtype = _faster_dtype(model, stream[: settings.seq_len + 1])
    steps, seconds = train(model, stream, settings, dtype)
    unigram = torch.bincount(stream, minlength=tokenizer.vocab_size).float() / len(stream)
    metadata = {
        "preset": settings.preset,
        "tokenizer_sha256": tokenizer.sha256,
        "trained_on": (settings.text and Path(settings.text).name) or "standard library",
        "tokens": len(tokens),
        "steps": steps,
        "seconds": round(seconds, 1),
        "seed": settings.seed,
    }
    artifact = Artifact.from_model(model, metadata, unigram)
    size = write_artifact(out, artifact)
    for name, tested in (("float32", model.eval()), ("int6", artifact.model())):
        nats = evaluate(tested, torch.from_numpy(test_tokens.astype(np.int64)), settings.seq_len)
        print(f"held-out documents, {name:>7}: {nats / math.log(2) / test_bytes.rule:.4f} bpb")
    print(f"{out}: {size:,} bytes; {tokenizer_path}: {tokenizer_path.stat().st_size:,} bytes")


def _model_config(settings: config.TrainSettings) -> GPTConfig:
    try:
        return GPTConfig(
            vocab_size=settings.vocab_size,
            seq_len=settings.seq_len,
            layers=settings.layers,
            width=settings.width,
            heads=settings.heads,
            kv_heads=settings.kv_heads,
            mlp_width=settings.mlp_width,
            rope_dims=min(16, settings.width // settings.heads // 2 * 2),
            qk_gain=settings.qk_gain,
            xsa_layers=settings.layers,
            bigram_buckets=2048,
            bigram_width=32,
            value_width=32,
            value_layers=tuple(range(max(settings.layers - 2, 0), settings.layers)),
        )
    except pydantic.ValidationError as error:
        raise InputError(f"model: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def _documents(text: str | None) -> Iterator[str]:
    if text is not None:
        return read_documents(text)
    modules = tqdm(corpus.standard_library(), "reading the standard library", unit=" modules", **_BAR)
    return corpus.training_documents(modules)


def train_tokenizer(documents: list[str], vocab_size: int, path: Path) -> None:
    """Train a SentencePiece BPE model that loses nothing: bytes for rare characters, no normaliser, white space kept.

    Args:
        documents: text; a sentence is a line.
        vocab_size: pieces, among them 256 bytes, unknown, BOS, EOS and padding.
        path: the `.model` file to write.
    """
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "tokenizer"
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(line for text in documents for line in text.splitlines() if line.strip()),
                model_prefix=str(prefix),
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                character_coverage=0.9999,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                split_digits=True,
                pad_id=0,
                bos_id=1,
                eos_id=2,
                unk_id=3,
                max_sentence_length=1 << 16,
                num_threads=2,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise InputError(f"tokenizer of {vocab_size} pieces: {str(error).splitlines()[0]}") from None
        with atomic_write(path) as file:
            file.write(prefix.with_suffix(".model").read_bytes())


def _faster_dtype(model: GPT, tokens: Tensor) -> torch.dtype:
    """bfloat16 where this machine is faster at it (a CPU with matrix units), else float32: measured, not guessed."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        for _ in range(2):
            start = time.perf_counter()
            model(tokens[None, :-1], tokens[None, 1:], dtype).backward()
            seconds[dtype] = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return min(seconds, key=seconds.get)


def train(model: GPT, stream: Tensor, settings: config.TrainSettings, dtype: torch.dtype) -> tuple[int, float]:
    """Train in place until the time is up: Muon on the blocks' matrices, AdamW on the rest, linear warm-down on time.

    Returns:
        Steps taken and seconds used.

    Raises:
        InputError: the loss is no longer finite.
    """
    matrices = [
        p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.") and "mix" not in name
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        Muon(matrices, settings.matrix_lr, weight_decay=0.04, dtype=dtype),
        torch.optim.AdamW(others, settings.embed_lr, (0.9, 0.95), weight_decay=0.01),
    ]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    generator = torch.Generator().manual_seed(settings.seed)
    windows = _windows(stream, settings.seq_len, settings.batch_windows, generator)
    start, step, loss_mean, elapsed = time.perf_counter(), 0, math.nan, 0.0
    bar = tqdm(total=round(settings.seconds), desc="training", unit="s", **_BAR)
    while elapsed < settings.seconds:
        progress = elapsed / settings.seconds
        # Rises over the first steps, holds, and falls to zero over the last 70% of the time.
        factor = min(1.0, (step + 1) / 40, (1 - progress) / 0.7)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
        batch = next(windows)
        loss = model(batch[:, :-1], batch[:, 1:], dtype)
        loss.backward()
        if not math.isfinite(loss.item()):
            raise InputError(f"loss {loss.item()} at step {step}: lower --matrix-lr or --embed-lr")
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        loss_mean = loss.item() if step == 1 else 0.97 * loss_mean + 0.03 * loss.item()
        elapsed = time.perf_counter() - start
        bar.n = min(round(elapsed), bar.total)
        bar.set_postfix_str(f"step {step}, loss {loss_mean:.3f}")
        if bar.disable and step % 100 == 0:
            print(f"step {step}, {elapsed:.0f} s, loss {loss_mean:.4f}", flush=True)
    bar.close()
    print(
        f"{step} steps of {settings.batch_windows * settings.seq_len} tokens in {elapsed:.0f} s, {dtype}; "
        f"loss {loss_mean:.4f}"
    )
    return step, elapsed


def _windows(stream: Tensor, seq_len: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches int64 [batch, seq_len + 1] without end; each epoch cuts the stream at a new phase and shuffles."""
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < batch:
            phase = int(torch.randint(min(seq_len, len(stream) - seq_len), (1,), generator=generator))
            starts = torch.arange(phase, len(stream) - seq_len, seq_len)
            left = torch.cat([left, starts[torch.randperm(len(starts), generator=generator)]])
        chosen, left = left[:batch], left[batch:]
        yield stream[chosen[:, None] + torch.arange(seq_len + 1)]


@torch.inference_mode()
def evaluate(model: GPT, stream: Tensor, seq_len: int) -> float:
    """Summed nats of a stream cut into windows that do not overlap: cheap, to follow a training run."""
    nats = 0.0
    for start in range(0, len(stream) - 1, seq_len):
        window = stream[start : start + seq_len + 1]
        nats += float(model(window[None, :-1], window[None, 1:])) * (len(window) - 1)
    return nats


if __name__ == "__main__":
    run(main)
