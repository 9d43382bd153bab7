"""Sums over the lanes of a warp whose replicas may differ in their last bits: found by reading the PTX, not running it.

A sum of products p = a b over lanes begins with p + (the p of another lane). Where that is one instruction,
fma(a, b, p of the other lane), each lane of a pair rounds the other's product and not its own: both hold "the sum",
with different bits. A branch on it parts the warp, and a store of it depends on which lane comes last. It happens where
a lane holds one element of the sum; with two or more, what is exchanged is a sum already. ptxas may do the same where
the PTX leaves a multiplication and an addition to be fused, which ".rn" forbids.
"""

from .parse import Kernel

_CARRY = ("mov.b64", "mov.b32", "cvt.u32.u64", "cvt.u64.u32", "shl.b64", "or.b64", "shfl.sync.bfly.b32")


def torn_sums(kernel: Kernel) -> list[str]:
    """Lines of the source whose sums begin so."""
    found: list[str] = []
    products: dict[str, tuple[set[str], bool]] = {}  # factors, and whether the rounding is fixed
    origin: dict[str, str] = {}  # of what only carries a number, or a half of it: the register that was computed
    exchanged: set[str] = set()  # holds another lane's

    def of(register: str) -> str:
        return origin.get(register, register)

    for each in kernel.instructions:
        parts, operands = each.parts, each.operands
        if not operands:
            continue
        kind, (target, *sources) = f"{parts[0]}.{parts[-1]}", operands
        if each.opcode in _CARRY:
            flat = [x for source in sources for x in (source if isinstance(source, tuple) else (source,))]
            flat = [x for x in flat if x.startswith("%")]
            known = {of(x) for x in flat}
            for name in target if isinstance(target, tuple) else (target,):
                origin[name] = known.copy().pop() if len(known) == 1 else name
                if parts[0] == "shfl" or exchanged.intersection(flat):
                    exchanged.add(name)
                else:
                    exchanged.discard(name)
            continue
        factors = None
        if kind in ("mul.f32", "mul.f64"):
            factors = {of(x) for x in sources}, "rn" in parts
        elif kind in ("fma.f32", "fma.f64") and sources[2] in exchanged:
            known, _ = products.get(of(sources[2]), (None, True))
            found += [each.where] if known == {of(x) for x in sources[:2]} else []
        elif kind in ("add.f32", "add.f64") and "rn" not in parts:
            for own, other in (sources, sources[::-1]):
                if other in exchanged and own not in exchanged and of(own) == of(other):
                    found += [] if products.get(of(own), (None, True))[1] else [each.where]
        if isinstance(target, str):
            products.pop(target, None)
            if factors:
                products[target] = factors
            origin.pop(target, None)
            exchanged.discard(target)
    return sorted(set(found))
