"""The forward pass against a deliberately naive one: loops over positions and heads, float64, nothing shared."""

import math

import pytest
import torch
from pydantic import ValidationError

from slotfast.model import GPT, GPTConfig
from tests.models import PLAIN, SMALL, random_model, randomised

VARIANTS = {
    "every part": {},
    "plain GPT": PLAIN,
    "untied, one head group": {"tied": False, "kv_heads": 4, "layers": 4, "value_layers": (0,)},
    "short of the rope length": {"rope_length": 64, "layers": 1, "value_layers": (0,)},
    "gated skips": {"skip_gates": True},
    "layers 1..2 run three times": {"loops": 2, "loop_start": 1, "loop_end": 2},
    "a segment without skips": {"loops": 1, "loop_start": 0, "loop_end": 4, "unet": False},
    "parallel residuals from layer 3": {"parallel_from": 3},
    "aware of documents": {"bos_id": 1},
    "all that came later": {
        "skip_gates": True,
        "loops": 2,
        "loop_start": 2,
        "loop_end": 3,
        "parallel_from": 2,
        "bos_id": 1,
    },
}


def _random_model(**changes) -> GPT:
    return randomised({**SMALL, **changes}, dtype=torch.float64).requires_grad_(True)


def _naive(model: GPT, tokens: list[int]) -> torch.Tensor:
    """Logits [T, V] position by position, from the written description of the architecture."""
    c, w = model.config, {name: tensor.detach() for name, tensor in model.state_dict().items()}

    def norm(v):
        return v / torch.sqrt((v * v).mean() + torch.finfo(torch.float64).eps)

    def alone(i):
        return i == 0 or tokens[i] == c.bos_id

    rows = []
    for i, token in enumerate(tokens):
        row = w["tok_emb.weight"][token].clone()
        if c.bigram_buckets:
            last = c.bigram_buckets - 1
            bucket = last if alone(i) else ((36313 * token) ^ (27191 * tokens[i - 1])) % last
            row += w["bigram.scale"] * (w["bigram.proj.weight"] @ w["bigram.embed.weight"][bucket])
        rows.append(norm(row))
    if c.smear:
        gate = 1 / (1 + torch.exp(-w["smear.gate"]))
        rows = [(1 - gate) * rows[i] + gate * (0 * rows[0] if alone(i) else rows[i - 1]) for i in range(len(rows))]
    x0, x, stack = rows, rows, []
    base = c.rope_base
    if len(tokens) > c.rope_length and c.rope_dims:
        base *= (len(tokens) / c.rope_length) ** (c.rope_dims / (c.rope_dims - 2))
    d = c.width // c.heads

    def turn(v, position):
        out, half = v.clone(), c.rope_dims // 2
        for j in range(half):
            angle = position * base ** (-2 * j / c.rope_dims)
            out[j] = v[j] * math.cos(angle) + v[half + j] * math.sin(angle)
            out[half + j] = v[half + j] * math.cos(angle) - v[j] * math.sin(angle)
        return out

    order = list(range(c.layers))
    for _ in range(c.loops):
        order[c.loop_end + 1 : c.loop_end + 1] = range(c.loop_start, c.loop_end + 1)
    for step, layer in enumerate(order):
        p = f"blocks.{layer}."
        shrink = 1 / math.sqrt(layer + 1) if c.ln_scale else 1
        if c.unet and step >= len(order) // 2 and stack:
            weight = w["skip_weights"][step - len(order) // 2]
            skip = stack.pop()
            share = 0 if not c.skip_gates else 1 / (1 + torch.exp(-w["skip_gates"][step - len(order) // 2]))
            rest = 1 if not c.skip_gates else share
            x = [rest * a + (1 - share) * weight * b for a, b in zip(x, skip, strict=True)]
        x = [w[p + "resid_mix"][0] * a + w[p + "resid_mix"][1] * b for a, b in zip(x, x0, strict=True)]
        h = [norm(a) * shrink for a in x]
        q, k, v = ([w[f"{p}attn.c_{n}.weight"] @ a for a in h] for n in "qkv")
        if c.value_width and layer in c.value_layers:
            which = c.value_layers.index(layer)
            for i, token in enumerate(tokens):
                extra = w["ve_shared.proj.weight"] @ w["ve_shared.embed.weight"][token] * w["ve_shared.scale"]
                v[i] = v[i] + extra * w[f"ve_layer_scales.{which}"]
        attended = []
        for i in range(len(tokens)):
            heads = []
            for head in range(c.heads):
                group = head // (c.heads // c.kv_heads)
                mine, theirs = slice(head * d, (head + 1) * d), slice(group * d, (group + 1) * d)
                query = turn(norm(q[i][mine]), i) * w[p + "attn.q_gain"][head]
                scores = torch.stack([query @ turn(norm(k[j][theirs]), j) for j in range(i + 1)]) / math.sqrt(d)
                share = torch.exp(scores - scores.max())
                share = share / share.sum()
                y = sum(share[j] * v[j][theirs] for j in range(i + 1))
                if layer >= c.layers - c.xsa_layers:
                    own = v[i][theirs] / v[i][theirs].norm()
                    y = y - (y @ own) * own
                heads.append(y)
            attended.append(w[p + "attn.proj.weight"] @ torch.cat(heads))
        block_input = x
        x = [a + w[p + "attn_scale"] * b for a, b in zip(x, attended, strict=True)]
        out = []
        for a, b in zip(x, block_input, strict=True):
            read = a if c.parallel_from is None or layer < c.parallel_from else b
            up = w[p + "mlp.fc.weight"] @ (norm(read) * shrink)
            up = torch.where(up > 0, up, 0.5 * up) ** 2
            out.append(a + w[p + "mlp_scale"] * (w[p + "mlp.proj.weight"] @ up))
        x = out
        if c.unet and step < len(order) // 2:
            stack.append(x)
    matrix = w["tok_emb.weight"] if c.tied else w["lm_head.weight"]
    logits = torch.stack([matrix @ norm(a) for a in x])
    return c.softcap * torch.tanh(logits / c.softcap) if c.softcap else logits


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_forward_equals_the_naive_one(changes):
    model = _random_model(**changes)
    tokens = torch.randint(0, 37, (2, 12), generator=torch.Generator().manual_seed(1))
    tokens[0, [0, 5, 6]] = 1
    logits = model.head(model.hidden(tokens))
    for row in range(2):
        expected = _naive(model, tokens[row].tolist())
        assert (logits[row] - expected).abs().max() < 1e-9 * expected.abs().max()


def test_head_of_some_positions_is_part_of_the_whole():
    model = _random_model()
    hidden = model.hidden(torch.arange(12)[None])
    assert (model.head(hidden[:, 7:]) - model.head(hidden)[:, 7:]).abs().max() < 1e-12


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_no_position_sees_a_later_token(changes):
    model = _random_model(**changes)
    tokens = torch.randint(0, 37, (1, 12), generator=torch.Generator().manual_seed(2))
    for position in range(12):
        other = tokens.clone()
        other[0, position] = (other[0, position] + 1) % 37
        before, after = model.hidden(tokens), model.hidden(other)
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.equal(before[:, position:], after[:, position:])


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_matrices_cast_once_give_the_bits_of_matrices_cast_in_every_forward(changes):
    model = random_model(**changes).float()
    tokens = torch.arange(24).reshape(2, 12) % model.config.vocab_size
    each_time = model.head(model.hidden(tokens, torch.bfloat16))
    assert torch.equal(model.cast_matrices(torch.bfloat16).head(model.hidden(tokens, torch.bfloat16)), each_time)
    assert model.tok_emb.weight.dtype == torch.bfloat16


def test_gradients_reach_every_parameter():
    model = _random_model(**VARIANTS["all that came later"])
    tokens = torch.randint(0, 37, (2, 13), generator=torch.Generator().manual_seed(3))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


def test_nothing_crosses_a_document_start_on_the_way_in():
    """One document twice: what enters the blocks is the same both times, and is not where nothing looks for BOS."""
    document = torch.tensor([1, 9, 4, 22, 30, 7])
    entering = {}
    for bos_id in (1, None):
        model = _random_model(bos_id=bos_id, layers=1, value_layers=(0,))
        seen = []
        model.blocks[0].register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0][0]))
        model.hidden(document.repeat(2)[None])
        entering[bos_id] = seen[0].unflatten(0, (2, 6))
    assert torch.equal(entering[1][0], entering[1][1])
    assert not torch.equal(entering[None][0], entering[None][1])
    assert torch.equal(entering[None][0], entering[1][0])


def test_the_published_order_of_repeated_layers():
    config = GPTConfig(loops=2, loop_start=3, loop_end=5)
    assert config.order == (0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10)
    assert config.skips == 8


def test_without_looping_each_layer_runs_once():
    looped = _random_model(loops=2, loop_start=1, loop_end=2)
    plain = _random_model()
    state = looped.state_dict()
    state["skip_weights"] = state["skip_weights"][:2]
    plain.load_state_dict(state)
    tokens = torch.arange(12)[None]
    assert not torch.equal(looped.hidden(tokens), plain.hidden(tokens))
    looped.looping = False
    assert torch.equal(looped.hidden(tokens), plain.hidden(tokens))


@pytest.mark.parametrize(("bigram", "count"), [((2048, 128), 26_993_756), ((3072, 112), 27_067_484)])
def test_published_parameter_counts(bigram, count):
    with torch.device("meta"):
        model = GPT(GPTConfig(bigram_buckets=bigram[0], bigram_width=bigram[1]))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "width 24 is not a multiple of heads 5"),
        ({"kv_heads": 3}, "heads 4 is not a multiple of kv_heads 3"),
        ({"rope_dims": 8}, "rope_dims 8: expected an even number up to 6"),
        ({"value_layers": (5,)}, "expected different layers of 0..4"),
        ({"bigram_buckets": 1}, "expected 0 or at least 2"),
        ({"loops": 1, "loop_start": 3, "loop_end": 5}, "loop 3..5: expected layers of 0..4 in order"),
        ({"loops": 1, "loop_start": 3, "loop_end": 2}, "loop 3..2: expected layers"),
        ({"skip_gates": True, "unet": False}, "there are no skips to gate"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        GPTConfig(**{**SMALL, **changes})
