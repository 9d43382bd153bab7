"""Keys and values of documents side by side, as the weights of their time made them.

A slot keeps those of its document's last tokens in a ring of `room` cells: the token at position p of the document lies
in cell p mod room. Keys are kept rotated, at their positions in the document: distances are all that rotation shows.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..model import GPT, rotary_table, rotate
from ..worker import upload

LOOK_BACK = 2  # tokens that smear gate and bigram hash reach back together


class SlotKeys:
    """What later chunks of some documents see of earlier ones.

    Args:
        model: whose keys they are.
        slots: documents side by side.
        window: tokens that one attends to, itself among them; the rotary base is that of this length.
        chunk: tokens that are taken in at once, and may then be forwarded again by what was there before them.
    """

    def __init__(self, model: GPT, slots: int, window: int, chunk: int):
        self.config, self.slots, self.window, self.room = model.config, slots, window, window + chunk
        self._rings: list[tuple[Tensor, Tensor] | None] = [None] * len(model.order)

    def ring(self, run: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer's run, [slots, room, kv_heads, head_width] each."""
        found = self._rings[run]
        if found is None:
            shape = self.slots, self.room, *like.shape[2:]
            found = self._rings[run] = like.new_zeros(shape), like.new_zeros(shape)
        return found

    def state_dict(self) -> list[tuple[Tensor, Tensor] | None]:
        """All that is kept, by the layer's run."""
        return list(self._rings)

    def load_state_dict(self, state: list[tuple[Tensor, Tensor] | None], device: torch.device) -> None:
        """Go on from what `state_dict` gave."""
        if len(state) != len(self._rings):
            raise ValueError(f"keys of {len(state)} runs of layers: expected {len(self._rings)}")
        self._rings = [ring and (ring[0].to(device), ring[1].to(device)) for ring in state]


class SlotAttention:
    """Attention of one batch, which its keys and values are taken in from; see `Attend`.

    Args:
        keys: of the slots.
        slots: row i of the batch is the next of slots[i].
        begins, ends: the first position of each row in its document, and the one behind its last; what a row has
            further on is padding.
        length: positions of a row.
        cached: whether rows go on from what is kept; else they see themselves alone.
        keep: whether to take keys and values in.
    """

    def __init__(
        self,
        keys: SlotKeys,
        slots: Sequence[int],
        begins: list[int],
        ends: list[int],
        length: int,
        device: torch.device,
        cached: bool,
        keep: bool,
    ):
        self.keys, self.cached, window, room = keys, cached, keys.window, keys.room
        begin = torch.tensor(begins)
        position = begin[:, None] + torch.arange(length)
        table = rotary_table(window, keys.config, position.flatten())
        self.rope = tuple(upload(part.unflatten(0, position.shape), device) for part in table)
        self.slots = upload(torch.tensor(slots), device)
        # Ring cells, in row-major order of the batch; padding is kept nowhere
        real = (position < torch.tensor(ends)[:, None]).numpy()
        rows, places = (upload(torch.from_numpy(found), device) for found in np.nonzero(real))
        cells = upload(position % room, device)[rows, places]
        self.kept = (self.slots[rows], cells), (rows, places) if keep else None
        if cached:
            last = begin[:, None] - 1
            held = last - (last - torch.arange(room)) % room  # the position whose key a cell holds
            held = torch.cat([torch.where(held < 0, -window, held), position], 1)[:, None]
            apart = position[..., None] - held
            self.seen = upload(((apart >= 0) & (apart < window))[:, None], device)

    def __call__(self, run: int, q: Tensor, k: Tensor, v: Tensor, exclude_own: bool) -> Tensor:
        first = k.size(1) - q.size(1)
        q, k = self._turn(q, first), self._turn(k, 0)
        seen = self.keys.ring(run, k.detach())
        if self.cached:
            together = (torch.cat([ring[self.slots], new], 1) for ring, new in zip(seen, (k, v), strict=True))
            queries, keys, values = (x.transpose(1, 2) for x in (q, *together))
            y = F.scaled_dot_product_attention(queries, keys, values, self.seen[:, :, first:], enable_gqa=True)
            y = y.transpose(1, 2)
        else:
            y = ops.attention(q, k, v)
        cells, places = self.kept
        if places is not None:
            for ring, new in zip(seen, (k, v), strict=True):
                ring[cells] = new.detach()[places]
        return ops.without_own(y, v[:, first:]) if exclude_own else y

    def _turn(self, x: Tensor, first: int) -> Tensor:
        """x [B, N, heads, head_width] at the positions from `first` on."""
        tables = (table[:, first:].flatten(0, 1) for table in self.rope)
        return rotate(x.flatten(0, 1)[None], *tables)[0].unflatten(0, x.shape[:2])
