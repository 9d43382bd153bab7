"""Text sampled from the model itself, one position a step with cached keys and values.

A step runs the model's own modules on one position. Keys and values of the positions before come out of a cache, and so
do the token and the embedding just before, which the bigram hash and the smear gate look back at. The rotary base
depends on the length of the whole input, so a decoder is made for a fixed length.

PR #1019 of openai/parameter-golf calibrates its quantisation on 64 windows of 2,048 tokens that are sampled so, which
needs no training data; it has no cache.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError
from .model import GPT, Attention, Block, GPTConfig, rms_norm, rotary_table, rotate

# Parts of a model that a step computes; any other must be at its default, which leaves it out.
_KNOWN = frozenset(
    (
        *("vocab_size", "seq_len", "layers", "width", "heads", "kv_heads", "mlp_width", "mlp_slope"),
        *("rope_dims", "rope_base", "rope_length", "qk_gain", "xsa_layers", "ln_scale", "unet", "smear"),
        *("bigram_buckets", "bigram_width", "value_width", "value_layers", "softcap", "tied"),
    )
)


class Decoder:
    """A model that reads position after position and remembers what later ones need.

    Args:
        model: in evaluation mode.
        batch: rows.
        length: positions that will be read in all.
        dtype: of the computation and of the cache; the embedding's where None.

    Raises:
        InputError: the model has parts that are not supported here.
    """

    def __init__(self, model: GPT, batch: int, length: int, dtype: torch.dtype | None = None):
        config, embedding = model.config, model.tok_emb.weight
        for name, field in GPTConfig.model_fields.items():
            if name not in _KNOWN and getattr(config, name) != field.default:
                raise InputError(f"sampling: a model with {name} {getattr(config, name)!r} is not supported")
        self.model, self.length, self.position = model, length, 0
        self.dtype = dtype or embedding.dtype
        self._rope = rotary_table(length, config, embedding.device)
        shape = (config.layers, batch, config.kv_heads, length, config.head_width)
        self._keys, self._values = (torch.empty(shape, dtype=self.dtype, device=embedding.device) for _ in range(2))
        # Of the last position: int [B, 1], none before the first; [B, 1, width] before the smear gate.
        self._token = torch.empty(batch, 0, dtype=torch.int64, device=embedding.device)
        self._embedding = torch.zeros(batch, 1, config.width, dtype=self.dtype, device=embedding.device)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Read one token a row.

        Args:
            tokens: int [B].

        Returns:
            The model's logits at this position of `length`, float32 (float64 for float64) [B, vocab_size].

        Raises:
            IndexError: all positions have been read.
        """
        if self.position == self.length:
            raise IndexError(f"a decoder of {self.length} positions has read them all")
        model, config, dtype = self.model, self.model.config, self.dtype
        token = tokens[:, None].to(torch.int64)
        x = model.tok_emb(token).to(dtype)
        if model.bigram is not None:
            x = x + model.bigram(torch.cat([self._token, token], 1), dtype)[:, -1:]
        x = embedding = rms_norm(x)
        if model.smear is not None:
            gate = torch.sigmoid(model.smear.gate).to(dtype)
            x = (1 - gate) * x + gate * self._embedding
        self._token, self._embedding = token, embedding
        x0, skips = x, []
        value = model.ve_shared(token, dtype) if model.ve_shared is not None else None
        for layer, block in enumerate(model.blocks):
            if skips and layer >= config.layers // 2:
                x = x + model.skip_weights[config.skips - len(skips)].to(dtype) * skips.pop()
            own_value = None
            if value is not None and layer in config.value_layers:
                own_value = value * model.ve_layer_scales[config.value_layers.index(layer)].to(dtype)
            x = self._block(block, layer, x, x0, own_value)
            if layer < config.skips:
                skips.append(x)
        self.position += 1
        return model.head(rms_norm(x[:, 0]))

    def _block(self, block: Block, layer: int, x: Tensor, x0: Tensor, value: Tensor | None) -> Tensor:
        mix = block.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        attended = self._attention(block.attn, layer, rms_norm(x) * block.norm_scale, value)
        x = x + block.attn_scale.to(x.dtype) * attended
        return x + block.mlp_scale.to(x.dtype) * block.mlp(rms_norm(x) * block.norm_scale)

    def _attention(self, attn: Attention, layer: int, x: Tensor, value: Tensor | None) -> Tensor:
        batch, here, past = x.size(0), self.position, slice(self.position + 1)
        q = attn.c_q(x).view(batch, 1, attn.heads, attn.head_width)
        k = attn.c_k(x).view(batch, 1, attn.kv_heads, attn.head_width)
        v = attn.c_v(x)
        v = (v if value is None else v + value).view(batch, attn.kv_heads, attn.head_width)
        cos, sin = (table[here, None] for table in self._rope)
        q = rotate(rms_norm(q), cos, sin) * attn.q_gain.to(x.dtype)[:, None]
        self._keys[layer, :, :, here] = rotate(rms_norm(k), cos, sin)[:, 0]
        self._values[layer, :, :, here] = v
        # The heads of a group are rows of one product with the keys that they share.
        q = q.view(batch, attn.kv_heads, -1, attn.head_width)
        y = F.scaled_dot_product_attention(q, self._keys[layer, :, :, past], self._values[layer, :, :, past])
        if attn.xsa:
            own = F.normalize(v, dim=-1)[:, :, None]  # (batch, kv_heads, 1, head_width)
            y = y - (y * own).sum(-1, keepdim=True) * own
        return attn.proj(y.reshape(batch, 1, -1))


@torch.no_grad()
def sample(
    model: GPT,
    windows: int,
    length: int,
    *,
    temperature: float = 0.8,
    seed: int = 1337,
    batch: int = 8,
    dtype: torch.dtype | None = None,
) -> Iterator[Tensor]:
    """Windows of tokens drawn from the model, each after a start token that is drawn uniformly.

    Args:
        model: in evaluation mode.
        windows: how many in all.
        length: tokens of each.
        temperature: of the draws; positive.
        seed: of the generator; the same seed on the same device draws the same tokens.
        batch: windows that are sampled at a time.
        dtype: of the computation; the embedding's where None.

    Yields:
        int64 [up to `batch`, length], on the model's device.

    Raises:
        InputError: temperature is not positive, the model's logits are NaN, or it has parts that are not supported.

    Source: the calibration of PR #1019.
    """
    if not temperature > 0:
        raise InputError(f"temperature {temperature}: expected a positive number")
    device = model.tok_emb.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    for first in range(0, windows, batch):
        rows = min(batch, windows - first)
        decoder = Decoder(model, rows, length, dtype)
        drawn = [torch.randint(model.config.vocab_size, (rows,), generator=generator, device=device)]
        while len(drawn) < length:
            shares = (decoder.step(drawn[-1]) / temperature).softmax(-1)
            if not shares.isfinite().all():
                raise InputError(f"sampling: the model's logits at position {len(drawn) - 1} are NaN or infinite")
            drawn.append(torch.multinomial(shares, 1, generator=generator)[:, 0])
        yield torch.stack(drawn, 1)
