"""The counts of `Repeats` without a table: by sorting the stream's last tokens, wherever they are; for GPUs.

A dictionary is read and written token by token on the host, some 10 us each; a GPU's forward takes less. Here a batch's
tokens are taken together with all earlier ones that still weigh anything. Runs of 1, 2, ... tokens get numbers, equal
where the runs are: those of m tokens by sorting pairs (number of the first m - 1, last token). In that sorted order the
places where the same run came lie side by side in the stream's order. How often the run had come before is, decayed,

    r_i = d_i (r_{i-1} + 1),    d_i: what is left of a count since the place before; 0 at the first place

a scan for all lengths at once, in which a place's sum covers earlier places only. Of token t after a
context of n tokens, c_j(t) is r of the run of n + 1 tokens that ends with t; and c_j, the sum over all tokens, r of the
context itself, one token earlier: a run that came again ends with the same token, which leaves the same of a count.

For example, the five tokens a b a b c, without decay. Sorted, the runs of one token are a at places 0 and 2, b at 1 and
3, c at 4, with r = 0 1, 0 1, 0; those of two are ab at 1 and 3, ba at 2, bc at 4, with r = 0 1, 0, 0. The last token is
c after b: c_1(c) is r of bc, 0, as no c has followed a b before; and c_1 is r of the b at place 3, 1: one token has, an
a.

That is `Repeats` but for rounding, and for what weighs less than 1e-12: where a stream is cut into batches decides what
of that still counts.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import ops
from ..kernels import decay_scan, decay_scan_ref
from ..worker import upload
from .repeats import CONTEXTS, LARGEST_UNIT, Columns, Followers

_CHUNK = 1 << 16  # tokens of a batch that are sorted at once
_LONGEST = 1 << 18  # earlier tokens sorted with them, at most


class SortedRepeats:
    """Decayed counts of what followed each context, carried along a stream; on the device of its tokens.

    Args:
        decay, document_decay: weight of a count one token, one document later.
        bos_id: the token that starts a document, or None.
    """

    def __init__(self, decay: float, document_decay: float, bos_id: int | None):
        self.bos_id = -1 if bos_id is None else bos_id
        self.token_age = -math.log(decay)
        self.document_age = -math.log(max(document_decay, 1 / LARGEST_UNIT))
        self.recent: Tensor | None = None

    @staticmethod
    def suits(decay: float) -> bool:
        """Whether what still weighs anything is short enough to be sorted for every batch."""
        return decay**_LONGEST < 1 / LARGEST_UNIT

    def take(self, tokens: Tensor, all_rows: bool = False, backend: ops.Backend = "auto") -> Followers:
        """Read what each token's contexts were followed by, and then count the token.

        Args:
            tokens: int64 [n], the next of the stream.
            all_rows: also give the counts of every other token.
            backend: of the scan.
        """
        found = [self._take(piece, all_rows, backend) for piece in tokens.split(_CHUNK)]
        total, hits = (torch.cat([getattr(part, name) for part in found]) for name in ("total", "hits"))
        if not all_rows:
            return Followers(total, hits, None)
        rows = [part.rows for part in found if part.rows is not None]
        token = torch.cat([piece + number * _CHUNK for number, (piece, *_) in enumerate(rows)])
        context, follower, weight = (torch.cat(column) for column in list(zip(*rows, strict=True))[1:])
        return Followers(total, hits, (token, context, follower, weight))

    def _take(self, tokens: Tensor, all_rows: bool, backend: ops.Backend) -> Followers:
        row = tokens if self.recent is None else torch.cat([self.recent, tokens])
        begin, length = len(row) - len(tokens), len(row)
        self.recent = row[-(math.ceil(math.log(LARGEST_UNIT) / self.token_age) + CONTEXTS[-1]) :]
        places, first = _places(row)
        started = pad((row == self.bos_id).cumsum(0), (1, 0))  # documents before each place
        left = self._weight(places, pad(places[:, :-1], (1, 0)), started).masked_fill(first, 0.0)
        scan = ops.choose(backend, left.device, decay_scan, decay_scan_ref)
        again = left.new_zeros(len(left), length + 1).scatter_(1, places, scan(left))  # [m - 1, place]
        contexts = upload(torch.tensor(CONTEXTS), row.device)
        total = pad(again[contexts - 1], (1, 0))[:, begin:length].T
        hits = again[contexts, begin:length].T
        return Followers(total, hits, self._rows(row, places, first, started, begin) if all_rows else None)

    def _weight(self, place: Tensor, earlier: Tensor, started: Tensor) -> Tensor:
        """How much of a count is left between an earlier place and a later one, float64."""
        # Computed from whole numbers, so that the bits do not depend on where the sorted piece begins
        tokens, documents = (place - earlier).double(), (started[place] - started[earlier]).double()
        return (-self.token_age * tokens - self.document_age * documents).exp()

    def _rows(self, row: Tensor, places: Tensor, first: Tensor, started: Tensor, begin: int) -> Columns:
        """Every (token, context, follower, weight): each place of a context with all places where it came before."""
        parts = []
        for j, length in enumerate(CONTEXTS):
            place, index = places[length - 1], torch.arange(len(row), device=row.device)
            group = torch.where(first[length - 1], index, 0).cummax(0).values
            asked = ((place >= begin - 1) & (place < len(row) - 1)).nonzero()[:, 0]
            before = asked - group[asked]
            one = asked.repeat_interleave(before)
            since = torch.arange(len(one), device=row.device) - (before.cumsum(0) - before).repeat_interleave(before)
            last, other = place[one], place[group[one] + since]
            weight = self._weight(last, other, started)
            parts.append((last + 1 - begin, torch.full_like(last, j), row[other + 1], weight))
        token, context, follower, weight = (torch.cat(column) for column in zip(*parts, strict=True))
        return token, context, follower, weight


def _places(row: Tensor) -> tuple[Tensor, Tensor]:
    """Where runs of m = 1, 2, ... tokens end, equal runs side by side, in the stream's order among themselves.

    Args:
        row: int64 [N].

    Returns:
        int64 [m - 1, N], places in 0..N - 1, and N behind the last one; and bool, where a run is another one.
    """
    length, lengths = len(row), CONTEXTS[-1] + 1
    places, new = (
        row.new_full((lengths, length), length),
        torch.ones(lengths, length, dtype=torch.bool, device=row.device),
    )
    number = row.new_zeros(length + 1)  # of the runs of no token, the one before the first token's too
    for skip in range(min(lengths, length)):  # runs that end with token skip, skip + 1, ...
        key = torch.add(row[skip:], number[:-1], alpha=1 << 32)
        ordered, order = key.sort(stable=True)
        torch.add(order, skip, out=places[skip, : len(key)])
        torch.ne(ordered[1:], ordered[:-1], out=new[skip, 1 : len(key)])
        number = torch.empty_like(key).scatter_(0, order, new[skip, : len(key)].cumsum(0))
    return places, new
