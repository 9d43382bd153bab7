"""The published LoRA loop (PR #1530 and its successors), plainly: what ours is held against, in numbers and in time.

As published, documents of a group start together and the whole group is computed until its longest document ends, a
finished one as a row of zeros; losses are those of every position of the window; every adapter is two batched products.
Processes take the groups in turn, where the published ones race for them; a phase comes behind a whole turn. Written
from a description of the published scripts, not from their code.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slotfast import ops
from slotfast.learn import Learning
from slotfast.model import GPT, rotary_table


class Adapters:
    """Factors of every place, for documents side by side.

    Args:
        draw: A's numbers of one document for a seed, in the order of the places: runs of layers, then the head.
    """

    def __init__(self, model: GPT, row: Learning, seeds: list[int], draw: Callable[[int], Tensor]):
        config = model.config
        self.scale = row.alpha / row.rank if row.alpha else 1.0
        outs = {"q": config.width, "k": config.kv_width, "v": config.kv_width, "attn": config.width}
        outs |= {"mlp": config.width, "head": config.vocab_size}
        places = [(run, name) for run in range(len(config.order)) for name in row.projections if name != "head"]
        places += [(0, name) for name in row.projections if name == "head"]
        self.a, self.b = {}, {}
        numbers = torch.stack([draw(seed) for seed in seeds]).split(row.rank * config.width, 1)
        for place, own in zip(places, numbers, strict=True):
            self.a[place] = nn.Parameter(own.view(len(seeds), row.rank, config.width).clone())
            self.b[place] = nn.Parameter(own.new_zeros(len(seeds), outs[place[1]], row.rank))
        self.parameters = [*self.a.values(), *self.b.values()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, row.lr, row.betas, row.eps, weight_decay=row.decay, fused=True
        )

    def reuse(self, row: Learning, seeds: list[int], draw: Callable[[int], Tensor]) -> None:
        """What a group of documents begins with: no B, no memory of the optimiser, and A as it is if it is kept."""
        with torch.no_grad():
            if row.start != "warm":
                numbers = torch.stack([draw(seed) for seed in seeds]).split(self.a[next(iter(self.a))][0].numel(), 1)
                for a, own in zip(self.a.values(), numbers, strict=True):
                    a.copy_(own.view_as(a))
            for b in self.b.values():
                b.zero_()
        self.optimizer.state.clear()

    def __call__(self, place: tuple[int, str], x: Tensor) -> Tensor | float:
        """What a place adds, for inputs [B, T, width]."""
        if place not in self.a:
            return 0.0
        return (x @ self.a[place].mT) @ self.b[place].mT * self.scale


def drawing(model: GPT, row: Learning) -> Callable[[int], Tensor]:
    """What draws A's numbers of one document for a seed, as the rows do: of every run of a layer, then of the head."""
    places = len(model.order) * len([name for name in row.projections if name != "head"]) + ("head" in row.projections)
    width, dtype = model.config.width, model.tok_emb.weight.dtype

    def draw(seed: int) -> Tensor:
        source = torch.Generator().manual_seed(seed)
        drawn = torch.empty(places * row.rank * width).uniform_(-1, 1, generator=source)
        return (drawn.to(dtype) / math.sqrt(width)).to(model.tok_emb.weight.device)

    return draw


def nothing(place: tuple[int, str], x: Tensor) -> float:
    """A model without adapters."""
    return 0.0


def window_losses(model: GPT, tokens: Tensor, length: int, added: Callable = nothing) -> Tensor:
    """Losses [B, T] of tokens [B, T + 1], each by those before it in its row; `length` sets the rotary base."""
    config, norm = model.config, lambda x: F.rms_norm(x, (x.size(-1),))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    batch, positions = inputs.shape
    rope = rotary_table(length, config, torch.arange(positions, device=tokens.device))
    dtype = model.tok_emb.weight.dtype
    x = model.tok_emb(inputs)
    if model.bigram is not None:
        x = x + model.bigram(inputs, dtype)
    x = norm(x)
    if model.smear is not None:
        x = model.smear(x, inputs)
    x0, skips, half = x, [], len(config.order) // 2
    for run, layer in enumerate(config.order):
        block = model.blocks[layer]
        if skips and run >= half:
            x = model.add_skip(x, skips.pop(), run - half)
        x = block.resid_mix[0] * x + block.resid_mix[1] * x0
        h = norm(x) * block.norm_scale
        q, k, v = (
            projection(h) + added((run, name), h)
            for name, projection in (("q", block.attn.c_q), ("k", block.attn.c_k), ("v", block.attn.c_v))
        )
        if model.ve_shared is not None and layer in config.value_layers:
            scale = model.ve_layer_scales[config.value_layers.index(layer)]
            v = v + model.ve_shared(inputs, dtype) * scale
        q = norm(q.view(batch, positions, config.heads, -1)) * block.attn.q_gain[:, None]
        k, v = (part.view(batch, positions, config.kv_heads, -1) for part in (norm_heads(k, config), v))
        y = ops.attention(rotate(q, *rope), rotate(k, *rope), v)
        y = ops.without_own(y, v) if block.attn.xsa else y
        attended = x + block.attn_scale * (block.attn.proj(y.flatten(2)) + added((run, "attn"), h))
        h = norm(x if block.parallel else attended) * block.norm_scale
        wide = F.leaky_relu(block.mlp.fc(h), block.mlp.slope).square()
        x = attended + block.mlp_scale * (block.mlp.proj(wide) + added((run, "mlp"), h))
        if config.unet and run < half:
            skips.append(x)
    x = norm(x)
    logits = model.unembed(x) + added((0, "head"), x)
    if config.softcap:
        logits = config.softcap * torch.tanh(logits / config.softcap)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(batch, positions)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Leading dimensions of x [B, T, heads, head_width] turned pairwise."""
    half, cos, sin = cos.size(-1), cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], -1)


def norm_heads(k: Tensor, config) -> Tensor:
    """Keys [B, T, kv_width] with every head normalised."""
    heads = k.unflatten(-1, (config.kv_heads, config.head_width))
    return F.rms_norm(heads, (config.head_width,)).flatten(2)


def cut(tokens: Tensor, bos_id: int) -> list[tuple[int, int]]:
    """(start, targets) of every document; the BOS of the next one is a document's last target."""
    starts = sorted({0, *(tokens == bos_id).nonzero()[:, 0].tolist()})
    ends = [*starts[1:], len(tokens) - 1]
    return [(start, end - start) for start, end in zip(starts, ends, strict=True) if end > start]


@dataclass
class Group:
    """Documents that start together, the shortest first, and their places in the stream's order."""

    documents: list[tuple[int, int]]
    numbers: list[int]


def groups(found: list[tuple[int, int]], size: int) -> Iterator[Group]:
    """Longest first; what is left over when all other groups are full are the longest."""
    order = sorted(range(len(found)), key=lambda number: found[number][1])
    for first in list(range(0, len(order), size))[::-1]:
        numbers = order[first : first + size]
        yield Group([found[number] for number in numbers], numbers)


def run(
    model: GPT,
    tokens: Tensor,
    row: Learning,
    window: int,
    bos_id: int,
    draw: Callable[[int], Tensor],
    world: int = 1,
) -> Tensor:
    """Losses [N - 1] of tokens 1, 2, ... of a stream, as published; `row` is one that takes the longest first.

    Args:
        world: processes, each of which keeps its own factors; they train one model.
    """
    model = copy.deepcopy(model).requires_grad_(False) if row.phases else model
    out = torch.full((len(tokens) - 1,), torch.nan, dtype=model.tok_emb.weight.dtype)
    ends = [row.prefix * (phase + 1) // row.phases for phase in range(row.phases)]
    scored, phase = [], 0
    kept: list[Adapters | None] = [None] * world

    def warm(short: bool) -> list[int]:
        return [1 + slot + (2 * phase + short) * row.slots for slot in range(row.slots)]

    dealt = list(groups(cut(tokens, bos_id), row.slots))
    for turn, group in enumerate(dealt):
        rank = turn % world
        fresh = [1 + number for number in group.numbers] if row.start == "fresh" else [0] * len(group.numbers)
        seeds = fresh if row.start != "warm" else None
        if len(group.documents) < row.slots:
            own = Adapters(model, row, seeds or warm(True)[: len(group.documents)], draw)
        else:
            own = kept[rank] = kept[rank] or Adapters(model, row, seeds or warm(False), draw)
            own.reuse(row, seeds or [], draw)
        _charge_group(model, tokens, group, own, row, window, out)
        if phase < len(ends):
            scored += group.documents
            all_meet = rank == world - 1 or turn == len(dealt) - 1
            if all_meet and len(scored) >= ends[phase]:
                prefix = sorted(scored, key=lambda document: document[1])[: ends[phase]]
                _train(model, torch.cat([tokens[start : start + n + 1] for start, n in prefix]), row, window, bos_id)
                phase, kept = phase + 1, [None] * world
    return out


def _charge_group(model: GPT, tokens: Tensor, group: Group, own: Adapters, row: Learning, window: int, out: Tensor):
    longest = max(n for _, n in group.documents)
    chunk = row.chunk
    for most, shorter in sorted(row.short, reverse=True):
        chunk = shorter if longest + 1 <= most else chunk
    counts = [math.ceil(n / chunk) for _, n in group.documents]
    for number in range(max(counts)):
        width = min((number + 1) * chunk, window)
        batch = torch.zeros(len(counts), width + 1, dtype=torch.int64)
        places = []
        for index, ((start, n), count) in enumerate(zip(group.documents, counts, strict=True)):
            if number >= count:
                places.append(None)
                continue
            end = min((number + 1) * chunk, n)
            begin = max(0, end - window)
            batch[index, : end - begin + 1] = tokens[start + begin : start + end + 1]
            places.append((start, begin, number * chunk, end))
        further = [number + 1 < count for count in counts]
        with torch.set_grad_enabled(any(further)):
            losses = window_losses(model, batch.to(model.tok_emb.weight.device), window, own)
        for index, place in enumerate(places):
            if place is not None:
                start, begin, first, end = place
                out[start + first : start + end] = losses[index, first - begin : end - begin].detach()
        if any(further):
            means = [
                losses[index, first - begin : end - begin].mean()
                for index, (place, more) in enumerate(zip(places, further, strict=True))
                if more
                for start, begin, first, end in [place]
            ]
            torch.stack(means).sum().backward()
            own.optimizer.step()
            own.optimizer.zero_grad(set_to_none=False)


def _train(model: GPT, tokens: Tensor, row: Learning, window: int, bos_id: int) -> None:
    """One phase of SGD on all weights; each document in a sequence is forwarded for itself."""
    pieces = math.ceil((len(tokens) - 1) / row.piece)
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), row.phase_lr, row.phase_momentum)
    for piece in range(pieces - 1):
        optimizer.param_groups[0]["lr"] = row.phase_lr * 0.5 * (1 + math.cos(math.pi * piece / (pieces - 1)))
        losses = []
        for first in range(piece * row.piece, (piece + 1) * row.piece, window):
            sequence = tokens[first : min(first + window, (piece + 1) * row.piece) + 1]
            borders = [0, *(at for at in (sequence[:-1] == bos_id).nonzero()[:, 0].tolist() if at), len(sequence) - 1]
            for begin, end in itertools.pairwise(borders):
                losses.append(window_losses(model, sequence[None, begin : end + 1], window)[0])
        torch.cat(losses).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), row.phase_clip)
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)
