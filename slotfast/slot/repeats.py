"""Repeats: what followed the last few tokens earlier in the stream, mixed into the model's distribution.

Of a token t, with context lengths n_1 < n_2 < ... (in tokens, up to the one before t):

    p_0(v) = the model's, with its bias
    p_j(v) = (1 - g_j) p_{j-1}(v) + g_j c_j(v) / c_j,    c_j = sum_v c_j(v);    p_j = p_{j-1} where c_j < 1e-6
    g_j    = sigmoid(a_j + b_j log c_j)

c_j(v) is the decayed number of times that v followed the same n_j tokens, over all tokens before t, including those of
t's own window: each was charged before it counts. Counts belong to contexts as they are, not to hashes of them,
and the gates do not look at t, so each p_j sums to 1 because p_{j-1} does. The gates are fitted on documents held out
from training (`fit_gates`) and stored with the model.

Source: prediction by partial matching (Cleary & Witten 1984) with interpolation; the gates are our own.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ..ops import Backend

CONTEXTS = (1, 2, 3, 4, 6, 8)
# What fits on held-out documents of two small models agreed on.
DEFAULT_GATES = ((-3.9, 0.25), (-2.05, 0.45), (-1.8, 0.3), (-1.7, 0.3), (-1.7, 0.2), (-1.0, 0.1))
# For a model that nothing was fitted to: strong models leave less to repeats.
CAUTIOUS_GATES = tuple((a - 0.5, b) for a, b in DEFAULT_GATES)
_LEAST_TOTAL = 1e-6  # below it, a rank that started later may have forgotten the context
LARGEST_UNIT = 1e12  # what weighs less than 1 / this is forgotten, so that tables stay bounded


# Index of the token, context, follower and weight, [m] each.
Columns = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Followers:
    """What followed the contexts of n tokens.

    Args:
        total: float64 [n, contexts], c_j; 0 where a context is new.
        hits: float64 [n, contexts], c_j of the token that came.
        rows: the parts of all c_j(v), as index of the token, context, v and weight, [m] each; None unless asked for.
    """

    total: Tensor
    hits: Tensor
    rows: Columns | None

    def of(self, chosen: np.ndarray) -> Self:
        """Those of some tokens, bool [n]; without rows."""
        index = torch.from_numpy(chosen)
        return type(self)(self.total[index], self.hits[index], None)


class Repeats:
    """Decayed counts of what followed each context, carried along a stream; on the host. `SortedRepeats` is for GPUs.

    Args:
        decay, document_decay: weight of a count one token, one document later.
        bos_id: the token that starts a document, or None.
    """

    def __init__(self, decay: float, document_decay: float, bos_id: int | None):
        # Instead of decaying old weights, new tokens count in ever larger units: no entry is touched twice.
        self.growth, self.bos_id = 1 / decay, bos_id
        self.document_growth = 1 / max(document_decay, 1 / LARGEST_UNIT)
        self.tables: list[dict[tuple[int, ...], dict[int, float]]] = [{} for _ in CONTEXTS]
        self.recent: tuple[int, ...] = ()
        self.unit = 1.0

    def take(self, tokens: Tensor, all_rows: bool = False, backend: Backend = "auto") -> Followers:
        """Read what each token's contexts were followed by, and then count the token.

        Args:
            tokens: int64 [n], the next of the stream.
            all_rows: also give the counts of every other token.
            backend: of `SortedRepeats`; nothing here depends on it.
        """
        total, hits = np.zeros((2, len(tokens), len(CONTEXTS)))
        rows: list[tuple[int, int, int, float]] = []
        row = (*self.recent, *tokens.tolist())
        for index, token in enumerate(row[len(self.recent) :]):
            end, unit = len(self.recent) + index, self.unit
            for j, (length, table) in enumerate(zip(CONTEXTS, self.tables, strict=True)):
                if length > end:
                    break
                followers = table.setdefault(row[end - length : end], {})
                if followers:
                    if all_rows:
                        rows.extend((index, j, v, weight / unit) for v, weight in followers.items() if v >= 0)
                    total[index, j] = followers[-1] / unit
                    hits[index, j] = followers.get(token, 0.0) / unit
                followers[-1] = followers.get(-1, 0.0) + unit  # key -1: the sum over all tokens
                followers[token] = followers.get(token, 0.0) + unit
            self.unit *= self.growth * (self.document_growth if token == self.bos_id else 1.0)
            if self.unit > LARGEST_UNIT:
                self._forget()
        self.recent = row[-CONTEXTS[-1] :]
        device = tokens.device
        columns = _columns(rows, device) if all_rows else None
        return Followers(torch.from_numpy(total).to(device), torch.from_numpy(hits).to(device), columns)

    def _forget(self) -> None:
        """Bring the unit back to 1, and drop contexts and followers that no longer weigh anything."""
        for j, table in enumerate(self.tables):
            self.tables[j] = {
                context: {token: weight / self.unit for token, weight in followers.items() if weight > 1.0}
                for context, followers in table.items()
                if followers[-1] > 1.0
            }
        self.unit = 1.0


def _columns(rows: list[tuple[int, int, int, float]], device: torch.device) -> Columns:
    *index, weight = zip(*rows, strict=True) if rows else ((), (), (), ())
    token, context, follower = (torch.tensor(column, dtype=torch.int64, device=device) for column in index)
    return token, context, follower, torch.tensor(weight, dtype=torch.float64, device=device)


def gated(total: Tensor, gates: Tensor) -> Tensor:
    """g_j: float64 [n, contexts] of total [n, contexts] and gates [contexts, 2]; 0 for new contexts."""
    seen = total >= _LEAST_TOTAL
    log_total = torch.where(seen, total, 1.0).log()
    return seen * torch.sigmoid(gates[:, 0] + gates[:, 1] * log_total)


def mix(p: Tensor, followers: Followers, gates: Tensor) -> Tensor:
    """Probabilities float64 [n] of the tokens that came, from those without repeats."""
    total, hits = followers.total, followers.hits
    gate, share = gated(total, gates), hits / torch.where(total > 0, total, 1.0)
    for j in range(total.size(1)):
        p = p + gate[:, j] * (share[:, j] - p)
    return p


def mix_rows(p: Tensor, followers: Followers, gates: Tensor) -> Tensor:
    """Probabilities float64 [n, V] of every token, from those without repeats; `followers` with all rows."""
    if followers.rows is None:
        raise ValueError("followers: expected all their rows")
    total = followers.total
    index, context, v, weight = followers.rows
    gate = gated(total, gates)
    for j in range(total.size(1)):
        mine = context == j
        counts = torch.zeros_like(p).index_put_((index[mine], v[mine]), weight[mine], accumulate=True)
        share = counts / torch.where(total[:, j] > 0, total[:, j], 1.0)[:, None]
        p = p + gate[:, j, None] * (share - p)
    return p


def fit_gates(nll: np.ndarray, followers: Followers, ridge: float = 10.0, iterations: int = 40) -> list[list[float]]:
    """Gates (a, b) that held-out text prefers: the summed loss plus ridge / 2 |gates - DEFAULT_GATES|^2, by L-BFGS.

    Args:
        nll: float [n], nats of each token without repeats.
        followers: of the same tokens.

    Returns:
        [contexts][2].
    """
    p = torch.from_numpy(np.exp(-np.asarray(nll, np.float64)))
    start = torch.tensor(DEFAULT_GATES, dtype=torch.float64)
    gates = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([gates], 1.0, iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -mix(p, followers, gates).log().sum() + ridge / 2 * (gates - start).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return gates.detach().tolist()
