"""What the model's forward is replaced by, piece by piece, in `bench.forward_ledger`; counted, not measured.

A piece that is a product reads what its epilogue needs besides, and that traffic stands in the elementwise groups, not
with the products. A row's norm before a product is a factor of its result: the kernel before leaves sums of squares,
four bytes a row for every 128 channels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.ledger import Ledger, Shape

BYTES = 2  # of bfloat16
PART = 128  # channels whose squares are summed together


@dataclass(frozen=True)
class Piece:
    """Lines in the place of others.

    Args:
        name: as issue texts and kernels have it.
        replaces: beginnings of the functions whose lines it is there instead of; several pieces may share one.
        group: of its traffic besides a product's.
        runs: for each of its launches (product's bytes read, written, bytes besides read, written, flops).
    """

    name: str
    replaces: tuple[str, ...]
    group: str
    runs: Callable[[Shape], Iterator[tuple[int, int, int, int, int]]]


def _rows(shape: Shape) -> Iterator[tuple[int, int, int]]:
    """Number of each run of a layer, its rows, and those that leave it: of the last one only what is scored."""
    last = len(shape.config.order) - 1
    for run in range(last + 1):
        yield run, shape.tokens, shape.wanted if run == last else shape.tokens


def _squares(rows: int, width: int) -> int:
    return 4 * rows * -(-width // PART)


def _product(rows: int, n: int, k: int) -> tuple[int, int, int]:
    """Bytes read and written, and operations."""
    return BYTES * k * (rows + n), BYTES * rows * n, 2 * rows * n * k


def _embedding(shape: Shape) -> Iterator[tuple[int, int, int, int, int]]:
    """Token's row plus the projected bigram's, normalised; the bigram's own rows are gathered for its product."""
    config, rows = shape.config, shape.tokens
    wide, narrow = BYTES * rows * config.width, BYTES * rows * config.bigram_width if config.bigram_buckets else 0
    if narrow:
        yield 0, 0, 8 * rows + narrow, narrow, 0
    yield 0, 0, 8 * rows + wide * (2 if narrow else 1), wide, 3 * rows * config.width


def _smear(shape: Shape) -> Iterator[tuple[int, int, int, int, int]]:
    if shape.config.smear:
        wide = BYTES * shape.tokens * shape.config.width
        yield 0, 0, wide + 8 * shape.tokens, wide, 3 * shape.tokens * shape.config.width


def _values(shape: Shape) -> Iterator[tuple[int, int, int, int, int]]:
    if shape.config.value_width and shape.config.value_layers:
        narrow = BYTES * shape.tokens * shape.config.value_width
        yield 0, 0, 8 * shape.tokens + narrow, narrow, 0


def _mix(shape: Shape) -> Iterator[tuple[int, int, int, int, int]]:
    """`channel_mix`: x, x0 and a skip, weighted."""
    config = shape.config
    half = len(config.order) // 2
    for run, rows, _ in _rows(shape):
        skip = config.unet and half <= run < half + config.skips
        wide = BYTES * rows * config.width
        yield 0, 0, wide * (2 + skip), wide + _squares(rows, config.width), rows * config.width * (5 + 2 * skip)


def _heads(shape: Shape) -> Iterator[tuple[int, int, int, int, int]]:
    """(a) One product for queries, keys and values: norm of the rows, norms of heads, rotation and gain behind it."""
    config = shape.config
    for run, rows, left in _rows(shape):
        weights = BYTES * config.width * (config.width + 2 * config.kv_width)
        read, written = (
            BYTES * rows * config.width + weights,
            BYTES * (left * config.width + 2 * rows * config.kv_width),
        )
        value = config.value_width and config.order[run] in config.value_layers
        besides = _squares(rows, config.width) + BYTES * rows * config.kv_width * bool(value)
        tables = 4 * rows // shape.windows * config.rope_dims if shape.block is None else 4 * rows * config.rope_dims
        operations = 2 * config.width * (left * config.width + 2 * rows * config.kv_width)
        yield read, written, besides + tables, 0, operations


def _own(shape: Shape) -> Iterator[tuple[int, int, int, int, int]]:
    """One pass behind attention that leaves a position's own value out; `banded_attention` does it itself."""
    config = shape.config
    for run, _, left in _rows(shape):
        if shape.block is None and config.order[run] >= config.layers - config.xsa_layers:
            wide = BYTES * left * config.width
            yield 0, 0, wide + BYTES * left * config.kv_width, wide, 6 * left * config.width


def _residual(shape: Shape, k: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(c) `linear_residual`: x + scale * (h W^T), and the squares of its rows."""
    width = shape.config.width
    for _, _, left in _rows(shape):
        read, written, operations = _product(left, width, k)
        yield read, written, BYTES * left * width, _squares(left, width), operations


def _squared(shape: Shape) -> Iterator[tuple[int, int, int, int, int]]:
    """(b) `linear_squared`: the first MLP product and its squared leaky ReLU."""
    config = shape.config
    for _, _, left in _rows(shape):
        read, written, operations = _product(left, config.mlp_width, config.width)
        yield read, written, _squares(left, config.width), 0, operations


def _loss(shape: Shape) -> Iterator[tuple[int, int, int, int, int]]:
    """(d) Losses straight from hidden states: no logits in memory."""
    config, rows = shape.config, shape.wanted
    read, _, operations = _product(rows, config.vocab_size, config.width)
    yield read, 0, 8 * rows + _squares(rows, config.width), 8 * rows, operations


PIECES = (
    Piece(
        "embedding, bigram and norm in one pass",
        ("GPT.states", "BigramHash.index", "BigramHash.forward"),
        "embedding",
        _embedding,
    ),
    Piece("smear gate in one pass", ("SmearGate.",), "embedding", _smear),
    Piece("rows of the value embedding", ("ValueEmbedding.forward", "GPT.states"), "embedding", _values),
    Piece("channel_mix", ("Block.forward", "GPT.add_skip"), "residual, mixing", _mix),
    Piece(
        "(a) queries, keys and values in one product",
        (
            "Attention.c_",
            "Attention.forward",
            "WindowAttention.__call__ > rotate",
            "_StreamAttention.__call__ > rotate",
            "Block.forward",
        ),
        "heads",
        _heads,
    ),
    Piece("own value left out in one pass", ("without_own",), "own value", _own),
    Piece("(b) linear_squared", ("MLP.fc", "MLP.forward", "Block.forward"), "mlp", _squared),
    Piece(
        "(c) linear_residual of attention",
        ("Attention.proj", "Block.forward"),
        "residual, mixing",
        lambda shape: _residual(shape, shape.config.width),
    ),
    Piece(
        "(c) linear_residual of the MLP",
        ("MLP.proj", "Block.forward"),
        "residual, mixing",
        lambda shape: _residual(shape, shape.config.mlp_width),
    ),
    Piece(
        "(d) losses from hidden states",
        ("GPT.unembed", "GPT.head", "cross_entropy", "GPT.states"),
        "head and loss",
        _loss,
    ),
)


def fused(before: Ledger, shape: Shape) -> Ledger:
    """The ledger with all pieces in their lines' place."""
    taken = tuple(name for piece in PIECES for name in piece.replaces)
    after = Ledger({key: line for key, line in before.lines.items() if not line.function.startswith(taken)})
    for piece in PIECES:
        for read, written, besides_read, besides_written, operations in piece.runs(shape):
            if read:
                after.add(piece.name, "linear", read=read, written=written, flops=operations, group="products")
            after.add(
                piece.name,
                "besides",
                read=besides_read,
                written=besides_written,
                flops=0 if read else operations,
                calls=0 if read else 1,
                group=piece.group,
            )
    return after
