"""The sliding-window plan: which positions of a stream each window reads, which it scores, and which rank owns it.

A stream of N + 1 tokens has N predictions; prediction p reads the tokens up to p and is charged for token p + 1.
Window k starts at prediction k * stride. The first one scores all its predictions, each later one the `stride` that no
window before it scored, with `seq_len - stride` predictions of context in front. So every token with a predecessor is
scored exactly once, the first window and the tail included.
"""

from dataclasses import dataclass

from .errors import InputError


@dataclass(frozen=True)
class Window:
    """One window; positions are in window coordinates, 0 <= context_end <= scored_end <= seq_len.

    Args:
        index: number of the window in the stream.
        start: prediction at position 0.
        context_end: positions [0, context_end) were scored by earlier windows: all that an adaptation may learn from.
        scored_end: positions [context_end, scored_end) are scored here; what follows is padding.
    """

    index: int
    start: int
    context_end: int
    scored_end: int

    @property
    def context(self) -> range:
        return range(self.context_end)

    @property
    def scored(self) -> range:
        return range(self.context_end, self.scored_end)


@dataclass(frozen=True)
class Plan:
    """All windows of a stream, computed when asked for.

    Args:
        predictions: tokens that have a predecessor, >= 0.
        seq_len: positions of a window, >= 1.
        stride: positions from one window to the next, 1..seq_len.

    Raises:
        InputError: a size out of range.
    """

    predictions: int
    seq_len: int
    stride: int

    def __post_init__(self):
        if self.seq_len < 1:
            raise InputError(f"sequence length {self.seq_len}: expected at least 1")
        if not 1 <= self.stride <= self.seq_len:
            raise InputError(f"stride {self.stride}: expected 1 to the sequence length {self.seq_len}")

    @property
    def positions(self) -> int:
        """Positions of a window: seq_len, or fewer where the whole stream is shorter."""
        return min(self.seq_len, self.predictions)

    def __len__(self) -> int:
        if self.predictions <= self.seq_len:
            return int(self.predictions > 0)
        return 1 + -(-(self.predictions - self.seq_len) // self.stride)

    def __getitem__(self, index: int) -> Window:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.stride
        return Window(
            index,
            start,
            self.seq_len - self.stride if index else 0,
            min(self.seq_len, self.predictions - start),
        )

    def owned(self, rank: int = 0, world: int = 1) -> range:
        """The contiguous windows of one rank, sizes differing by at most one."""
        return range(rank * len(self) // world, (rank + 1) * len(self) // world)

    def owner(self, index: int, world: int = 1) -> int:
        """The rank whose `owned` range holds window `index`."""
        return ((index + 1) * world - 1) // len(self)
