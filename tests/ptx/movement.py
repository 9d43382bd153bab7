"""Instructions that move data between registers, threads and memory, and products of matrices: calls of the machine."""

import re

from .arithmetic import KINDS, Arithmetic
from .order import OPERATIONS


class Translator(Arithmetic):
    """Every instruction that is known."""

    def _vector(self, operand) -> tuple:
        return operand if isinstance(operand, tuple) else (operand,)

    def do_ld(self, each, number):
        parts = each.parts
        targets = self._vector(each.operands[0])
        kind = KINDS[parts[-1]]
        width = int(kind[1])
        place = each.operands[1]
        if parts[1] == "param":
            index = self.parameters[place.base]
            kind = kind if kind[0] == "i" else f"u{width}"
            self.put(targets[0], f"m.parameters[{index}].view(n.{kind})[()]", kind, self.guard(each))
            return None
        if parts[1] not in ("global", "shared"):
            return NotImplemented
        guard = self.guard(each)
        address = self.address(place, "u8" if parts[1] == "global" else "u4")
        self.lines.append(f"t = m.load(m.{parts[1]}_, {address}, mask, {guard}, {width}, {len(targets)}, {number})")
        for index, target in enumerate(targets):
            self.put(target, f"t[{index}]", f"u{width}", guard)
        return None

    def do_st(self, each, number):
        parts = each.parts
        sources = self._vector(each.operands[1])
        width = int(KINDS[parts[-1]][1])
        if parts[1] not in ("global", "shared"):
            return NotImplemented
        address = self.address(each.operands[0], "u8" if parts[1] == "global" else "u4")
        values = ", ".join(self.value(source, f"u{width}") for source in sources)
        self.lines.append(
            f"m.store(m.{parts[1]}_, {address}, mask, {self.guard(each)}, {width}, ({values},), {number})"
        )
        return None

    def do_atom(self, each, number):
        """Semantics and scope in any order, as Triton writes them; `red` is one without a result."""
        parts = set(each.parts[1:])
        semantics = parts & {"relaxed", "acquire", "release", "acq_rel"} or {"relaxed"}
        scope = parts & {"cta", "gpu", "sys"} or {"gpu"}
        operation = parts & OPERATIONS.keys()
        kind = KINDS.get(each.parts[-1])
        known = {"global", each.parts[-1], *semantics, *scope, *operation}
        if parts - known or "global" not in parts or len(operation) != 1 or kind is None or int(kind[1]) < 4:
            return NotImplemented
        *target, place, first = each.operands[: 2 + (each.parts[0] == "atom")]
        operands = (first, *each.operands[3:])
        values = ", ".join(f"{self.value(operand, kind)}" for operand in operands)
        guard = self.guard(each)
        self.lines.append(
            f"t = m.atomic({self.address(place, 'u8')}, mask, {guard}, n.{kind}, {operation.pop()!r}, ({values},), "
            f"{semantics.pop()!r}, {scope.pop()!r}, {number})"
        )
        for name in target:
            self.put(name, "t", kind, guard)
        return None

    do_red = do_atom

    def do_fence(self, each, number):
        parts = each.parts[1:]
        if parts[0] == "proxy":  # what it orders is in order here
            return None
        if parts[0] not in ("acq_rel", "sc") or parts[1:] not in (["gpu"], ["sys"]):
            return NotImplemented
        self.lines.append(f"m.fence(mask, {self.guard(each)})")
        return None

    def do_cp(self, each, number):
        parts = each.parts
        if parts[1] != "async":
            return NotImplemented
        if parts[2] == "commit_group":
            self.lines.append("m.commit_copies(mask)")
        elif parts[2] in ("wait_group", "wait_all"):
            self.lines.append(f"m.wait_copies(mask, {each.operands[0] if each.operands else 0}, {number})")
        elif parts[2] in ("ca", "cg") and parts[-2:] == ["shared", "global"]:
            to, source, size, *given = each.operands
            given = self.value(given[0], "u4") if given else f"n.u4({int(size, 0)})"
            self.lines.append(
                f"m.copy({self.address(to, 'u4')}, {self.address(source, 'u8')}, mask, {self.guard(each)}, "
                f"{int(size, 0)}, {given}, {number})"
            )
        else:
            return NotImplemented
        return None

    def do_bar(self, each, number):
        if each.parts[1:] != ["warp", "sync"] or each.operands != ("-1",):
            return NotImplemented
        self.lines.append(f"m.synchronise_warps(mask, {number})")
        return None

    def do_shfl(self, each, number):
        target, source, lane, clamp, members = each.operands
        limits = {"bfly": "31", "idx": "31", "up": "0"}
        if each.parts[1] != "sync" or limits.get(each.parts[2]) != clamp or members != "-1":
            return NotImplemented
        value, by = self.value(source, "u4"), self.value(lane, "u4")
        self._simple(each, f"m.shuffle({each.parts[2]!r}, {value}, {by}, mask, {number})", "u4")
        return None

    def do_ldmatrix(self, each, number):
        targets, place = each.operands
        trans = "trans" in each.parts
        self.lines.append(f"t = m.load_matrices({self.address(place, 'u4')}, mask, {len(targets)}, {trans}, {number})")
        for index, target in enumerate(targets):
            self.put(target, f"t[{index}]", "u4", None)

    def do_stmatrix(self, each, number):
        place, sources = each.operands
        values = ", ".join(self.value(source, "u4") for source in sources)
        trans = "trans" in each.parts
        self.lines.append(f"m.store_matrices({self.address(place, 'u4')}, mask, ({values},), {trans}, {number})")

    def do_mma(self, each, number):
        parts = each.parts
        if parts[1:6] != ["sync", "aligned", "m16n8k16", "row", "col"] or parts[6] != "f32" or parts[9] != "f32":
            return NotImplemented
        d, a, b, c = each.operands
        a, b = (", ".join(self.value(x, "u4") for x in group) for group in (a, b))
        c = ", ".join(self.value(x, "f4") for x in c)
        self.lines.append(f"t = m.multiply_matrices({parts[7]!r}, ({a}), ({b}), ({c}), mask, {number})")
        for index, target in enumerate(d):
            self.put(target, f"t[{index}]", "f4", None)
        return None

    def do_wgmma(self, each, number):
        parts = each.parts
        if parts[1] == "commit_group":
            self.lines.append("m.commit_products(mask)")
            return None
        if parts[1] == "wait_group":
            self.lines.append(f"m.wait_products(mask, {each.operands[0]}, {number})")
            return None
        shape = re.fullmatch(r"m64n(\d+)k16", parts[4])
        if parts[1] != "mma_async" or not shape or parts[5] != "f32":
            return NotImplemented
        d, a, b, scale_d, scale_a, scale_b, *transposed = each.operands
        if (scale_a, scale_b) != ("1", "1"):
            return NotImplemented
        kind = parts[6]
        acc = ", ".join(self.value(x, "f4") for x in d)
        if isinstance(a, tuple):
            left = "(" + ", ".join(self.value(x, "u4") for x in a) + ")"
            transposed = ["0", *transposed]
        else:
            left = self.value(a, "u8")
        keep = self.value(scale_d, "p")
        self.lines.append(
            f"t = m.multiply_group({kind!r}, {int(shape.group(1))}, ({acc}), {left}, {self.value(b, 'u8')}, {keep}, "
            f"{', '.join(transposed)}, mask, {number})"
        )
        for index, target in enumerate(d):
            self.put(target, f"t[{index}]", "f4", None)
        return None
