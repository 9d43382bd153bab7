"""The GPT: layers, embeddings and the output matrix, put together."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .config import GPTConfig
from .layers import (
    Attend,
    BigramHash,
    Block,
    Linear,
    PackedLinear,
    SmearGate,
    ValueEmbedding,
    WindowAttention,
    rms_norm,
    softcap,
)


class GPT(nn.Module):
    """The whole model.

    Args:
        config: shape and parts.

    `looping` is for training, which may start with every layer run once: False leaves out the repetitions. `backend` is
    that of the blocks: triton, torch or auto.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.looping = True
        self.backend: ops.Backend = "auto"
        self.tok_emb = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.tok_emb.weight, std=0.005)
        self.bigram = BigramHash(config) if config.bigram_buckets else None
        self.smear = SmearGate(config) if config.smear else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.skip_weights = nn.Parameter(torch.ones(config.skips, config.width)) if config.skips else None
        gates = config.skips and config.skip_gates
        self.skip_gates = nn.Parameter(torch.zeros(config.skips, config.width)) if gates else None
        has_values = config.value_width and config.value_layers
        self.ve_shared = ValueEmbedding(config) if has_values else None
        scales = config.value_layers if has_values else ()
        self.ve_layer_scales = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in scales)
        self.lm_head = None if config.tied else Linear(config.width, config.vocab_size)

    def hidden(
        self, tokens: Tensor, dtype: torch.dtype | None = None, first: int = 0, length: int | None = None
    ) -> Tensor:
        """Normalised states before the output matrix, of windows.

        Args:
            tokens: int [B, T].
            dtype: of the computation; the embedding's where None.
            first: position from which on states are wanted; the last layer leaves out what those before it alone need.
            length: that the windows would have, were there more of the stream; T by default.

        Returns:
            [B, T - first, width] in that dtype.
        """
        attend = WindowAttention(tokens.size(1), self.config, tokens.device, length)
        return self.states(tokens, attend, dtype or self.tok_emb.weight.dtype, first=first)

    def cast_matrices(self, dtype: torch.dtype) -> "GPT":
        """Cast linear weights and embeddings once instead of in each forward; every state keeps the same bits.

        Packed layers keep matrices of the dtype besides, which rounds their weights, where those of all stay in a GPU's
        L2 cache together: unpacking would save no bytes of memory there.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.data = module.weight.data.to(dtype)
        packed = [module for module in self.modules() if isinstance(module, PackedLinear)]
        n_bytes = dtype.itemsize * sum(math.prod(module.shape) for module in packed)
        for module in packed:
            if ops.keeps_dense(module.backend, module.low.device, n_bytes):
                module.keep_dense(dtype)
        return self

    @property
    def order(self) -> tuple[int, ...]:
        """Layers in the order in which they run."""
        return self.config.order if self.looping else tuple(range(self.config.layers))

    def states(self, tokens: Tensor, attend: Attend, dtype: torch.dtype, before: int = 0, first: int = 0) -> Tensor:
        """Normalised states before the output matrix, of tokens that attend as `attend` says.

        Args:
            tokens: int [B, before + T].
            attend: called once for each layer's run, with the queries, keys and values of the last T tokens.
            dtype: of the computation.
            before: leading tokens that only smear gate and bigram hash look at.
            first: of the T positions, the first whose state is wanted.

        Returns:
            [B, T - first, width] in that dtype.
        """
        x = self.tok_emb(tokens).to(dtype)
        if self.bigram is not None:
            x = x + self.bigram(tokens, dtype)
        x = rms_norm(x)
        if self.smear is not None:
            x = self.smear(x, tokens)
        x, tokens = x[:, before:], tokens[:, before:]
        x0 = x
        skips: list[Tensor] = []
        value = self.ve_shared(tokens, dtype) if self.ve_shared is not None else None
        order = self.order
        half = len(order) // 2
        for run, layer in enumerate(order):
            skip = skips.pop() if skips and run >= half else None
            own_value = None
            if value is not None and layer in self.config.value_layers:
                own_value = value * self.ve_layer_scales[self.config.value_layers.index(layer)].to(dtype)
            block = cast(Block, self.blocks[layer])
            cut = first if run == len(order) - 1 else 0
            if block.fuses(attend, self.backend, x):
                weights = block.mixing(*self.skip_share(run - half) if skip is not None else (None, None))
                x = block.fused(ops.channel_mix(x, x0, skip, weights), own_value, attend, run, cut)
            else:
                x = x if skip is None else self.add_skip(x, skip, run - half)
                x = block(x, x0, own_value, attend, run, cut)
            if self.config.unet and run < half:
                skips.append(x)
        return rms_norm(x)

    def skip_share(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Weight [width] of the skip that step `index` of the second half takes, and x's share [width], if gated."""
        if self.skip_weights is None:
            raise ValueError("a model without U-Net skips has none to add")
        gates = self.skip_gates
        return self.skip_weights[index], None if gates is None else torch.sigmoid(gates[index])

    def add_skip(self, x: Tensor, skip: Tensor, index: int) -> Tensor:
        """States x joined with those of the skip that step `index` of the second half takes; both [B, T, width]."""
        weight, share = self.skip_share(index)
        skip = weight.to(x.dtype) * skip
        return x + skip if share is None else torch.lerp(skip, x, share.to(x.dtype))

    def output_matrix(self, dtype: torch.dtype) -> Tensor:
        """[vocab_size, width] in a dtype: the embedding, or a matrix of its own."""
        return (self.tok_emb.weight if self.lm_head is None else self.lm_head.weight).to(dtype)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states [..., width] before the soft cap, in their dtype [..., vocab_size]."""
        return F.linear(hidden, self.output_matrix(hidden.dtype))

    def head(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits of hidden states [..., width], soft-capped, float32 (float64 for float64) [..., vocab_size].

        A bias [..., vocab_size] is added before the cap.
        """
        if bias is None and ops.fuses_output(self.backend, hidden):
            matrix = self.output_matrix(hidden.dtype)
            if not (torch.is_grad_enabled() and (hidden.requires_grad or matrix.requires_grad)):
                return ops.linear_logits(hidden, matrix, self.config.softcap)
        logits = self.unembed(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return softcap(logits if bias is None else logits + bias, self.config.softcap)

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of targets int [...] under states [..., width]: float32 (float64 for float64) [...], nats.

        Without logits in memory where kernels run in half precision.
        """
        matrix = self.output_matrix(hidden.dtype)
        return ops.linear_cross_entropy(hidden, matrix, targets, softcap=self.config.softcap, backend=self.backend)

    def forward(self, tokens: Tensor, targets: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Mean cross-entropy in nats; tokens and targets int [B, T]."""
        return self.losses(self.hidden(tokens, dtype), targets).mean()
