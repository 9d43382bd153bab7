"""What each instruction computes, as Python on numpy arrays: operands, and arithmetic."""

import re

import numpy as np

from . import numbers
from .parse import Address, Instruction, Kernel

KINDS = {
    "b8": "u1", "u8": "u1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "b32": "u4", "u32": "u4", "s32": "i4",
    "f32": "f4", "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8",
}  # fmt: skip
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "hi": ">"}
_BITWISE = {"and": "&", "or": "|", "xor": "^"}
_SPECIAL = {
    f"%{name}.{axis}": f"m.{name}[{i}]" for name in ("tid", "ctaid", "ntid", "nctaid") for i, axis in enumerate("xyz")
}
_APPROXIMATE = {
    "ex2": "ex2", "lg2": "lg2", "rcp": "reciprocal", "sqrt": "square_root", "rsqrt": "reciprocal_square_root",
    "tanh": "tanh",
}  # fmt: skip
_ORDER_ONLY = "wgmma.fence"  # nothing to do: what it orders is not seen here


class Unknown(Exception):
    """An instruction that this package has not learned."""


def register_name(text: str) -> str:
    return text.removeprefix("%") if text.startswith("%") else "_"


class Arithmetic:
    """Source of the function of one block: `lines`, and the constants that they name."""

    def __init__(self, kernel: Kernel, shared_symbols: dict[str, int]):
        self.kernel, self.symbols = kernel, shared_symbols
        self.parameters = {name: index for index, (name, _) in enumerate(kernel.parameters)}
        self.constants: dict[str, object] = {}
        self.lines: list[str] = []

    # Operands

    def width(self, register: str) -> int:
        return self.kernel.widths.get(re.match(r"%[a-z]+", register).group(), 32) if register.startswith("%") else 32

    def constant(self, value) -> str:
        name = f"c{len(self.constants)}"
        for known, old in self.constants.items():
            if type(old) is type(value) and old.tobytes() == value.tobytes():
                return known
        self.constants[name] = value
        return name

    def value(self, operand: str, kind: str) -> str:
        """Expression of an operand as an array of `kind` ("u4", "f4", ...; "p" for predicates, "bf" for bfloat16)."""
        if operand in _SPECIAL:
            return _SPECIAL[operand]
        if operand.startswith("%"):
            name = register_name(operand)
            if kind == "p":
                return name
            if kind == "bf":
                return f"n.from_bf16({name})"
            bits, own = 8 * int(kind[1]), self.width(operand)
            if own > bits:
                name = f"{name}.astype(n.u{bits // 8})"
            return name if kind[0] == "u" else f"{name}.view(n.{kind})"
        if operand in self.symbols:
            return self.constant(np.uint32(self.symbols[operand]))
        if kind == "p":
            return self.constant(np.bool_(int(operand, 0) != 0))
        number = int(operand[2:], 16) if operand[:2].lower() in ("0f", "0d") else int(operand.rstrip("U"), 0)
        if kind == "bf":
            return self.constant(np.uint32((number & 0xFFFF) << 16).view(np.float32))
        bits = 8 * int(kind[1])
        raw = getattr(np, f"uint{bits}")(number & ((1 << bits) - 1))
        return self.constant(raw if kind[0] == "u" else raw.view(getattr(numbers, kind)))

    def put(self, operand: str, expression: str, kind: str, guard: str | None):
        """Writes an expression of `kind` to a register, where the guard holds."""
        name = register_name(operand)
        if kind == "bf":
            expression = f"n.to_bf16({expression})"
        elif kind != "p":
            own = self.width(operand) // 8 if operand.startswith("%") else int(kind[1])
            if own > int(kind[1]):  # a load into a wider register extends as its type says
                expression = f"({expression}).astype(n.{kind[0]}{own})"
            if kind[0] != "u":
                expression = f"({expression}).view(n.u{own})"
        if guard:
            expression = f"where({guard}, {expression}, {name})"
        self.lines.append(f"{name} = {expression}")

    @staticmethod
    def guard(instruction: Instruction) -> str | None:
        if instruction.guard is None:
            return None
        if instruction.guard.startswith("!"):
            return f"(~{register_name(instruction.guard[1:])})"
        return register_name(instruction.guard)

    def address(self, operand: Address, kind: str) -> str:
        base, bits = self.value(operand.base, kind), 8 * int(kind[1])
        return f"{base} + {self._unsigned(bits, operand.offset % 2**bits)}" if operand.offset else base

    def _unsigned(self, bits: int, number: int) -> str:
        return self.constant(getattr(np, f"uint{bits}")(number))

    # Instructions

    def instruction(self, each: Instruction, number: int):
        name = each.parts[0]
        if each.opcode.startswith(_ORDER_ONLY):
            return
        handler = getattr(self, f"do_{name}", None)
        if handler is None or handler(each, number) is NotImplemented:
            raise Unknown(f"{each} ({', '.join(map(str, each.operands))})")

    def _simple(self, each, expression, kind):
        self.put(each.operands[0], expression, kind, self.guard(each))

    def _kind(self, each) -> str:
        last = each.parts[-1]
        if each.parts[0] == "mov" and last != "pred":
            return f"u{KINDS[last][1]}"
        return "p" if last == "pred" else "bf" if last == "bf16" else KINDS[last]

    def do_mov(self, each, number):
        target, source = each.operands
        guard = self.guard(each)
        kind = self._kind(each)
        if isinstance(target, tuple):  # unpack
            half = 8 * int(kind[1]) // len(target)
            name = self.value(source, kind)
            for index, part in enumerate(target):
                if part.startswith("%"):
                    shifted = f"({name} >> {self._unsigned(8 * int(kind[1]), half * index)})"
                    self.put(part, f"{shifted}.astype(n.u{half // 8})", f"u{half // 8}", guard)
        elif isinstance(source, tuple):  # pack
            bits = 8 * int(kind[1])
            half = bits // len(source)
            parts = [
                f"({self.value(part, f'u{half // 8}')}.astype(n.{kind}) << {self._unsigned(bits, half * index)})"
                for index, part in enumerate(source)
            ]
            self._simple(each, " | ".join(parts), kind)
        else:
            self._simple(each, self.value(source, kind), kind)

    def _packed(self, each, operator):
        """f16x2 and bf16x2."""
        kind = "bf" if "bf16x2" in each.parts else "f2"
        operands = [self.value(operand, "u4") for operand in each.operands[1:]]
        self._simple(each, f"m.packed({operator!r}, {kind!r}, {', '.join(operands)})", "u4")

    def _binary(self, each, operator):
        parts = each.parts
        if parts[-1] in ("f16x2", "bf16x2"):
            return self._packed(each, operator)
        kind = self._kind(each)
        a, b = (self.value(operand, kind) for operand in each.operands[1:])
        result = f"({a} {operator} {b})"
        if "ftz" in parts:
            result = f"n.flush({result})"
        self._simple(each, result, kind)

    def do_add(self, each, number):
        return self._binary(each, "+")

    def do_sub(self, each, number):
        return self._binary(each, "-")

    def do_mul(self, each, number):
        parts = each.parts
        if "wide" in parts:
            kind = self._kind(each)
            return self._simple(each, self._wide(each), f"{kind[0]}{2 * int(kind[1])}")
        if "hi" in parts:
            kind = self._kind(each)
            if kind[1] == "8":
                if kind != "u8":
                    return NotImplemented
                a, b = (self.value(operand, kind) for operand in each.operands[1:])
                return self._simple(each, f"n.multiply_high({a}, {b})", kind)
            wide = self.constant(getattr(np, "int64" if kind[0] == "i" else "uint64")(32))
            return self._simple(each, f"(({self._wide(each)}) >> {wide}).astype(n.{kind})", kind)
        return self._binary(each, "*")

    def _wide(self, each) -> str:
        kind = self._kind(each)
        wide = f"n.{kind[0]}{2 * int(kind[1])}"
        a, b = (self.value(operand, kind) for operand in each.operands[1:3])
        return f"{a}.astype({wide}) * {b}.astype({wide})"

    def do_mad(self, each, number):
        kind = self._kind(each)
        if "wide" in each.parts:
            wide = f"{kind[0]}{2 * int(kind[1])}"
            return self._simple(each, f"{self._wide(each)} + {self.value(each.operands[3], wide)}", wide)
        if "lo" not in each.parts:
            return NotImplemented
        a, b, c = (self.value(operand, kind) for operand in each.operands[1:])
        self._simple(each, f"{a} * {b} + {c}", kind)

    def do_fma(self, each, number):
        if each.parts[-1] in ("f16x2", "bf16x2"):
            return self._packed(each, "fma")
        kind = self._kind(each)
        a, b, c = (self.value(operand, kind) for operand in each.operands[1:])
        result = f"n.fma64({a}, {b}, {c})" if kind == "f8" else f"n.fma32({a}, {b}, {c})"
        if kind == "f2":
            result = f"{result}.astype(n.f2)"
        self._simple(each, f"n.flush({result})" if "ftz" in each.parts else result, kind)

    def do_div(self, each, number):
        kind = self._kind(each)
        a, b = (self.value(operand, kind) for operand in each.operands[1:])
        if kind[0] != "f":
            return self._simple(each, f"n.divide({a}, {b})", kind)
        if "full" in each.parts or "approx" in each.parts:
            return self._simple(each, f"m.approximate.divide({a}, {b})", kind)
        self._simple(each, f"{a} / {b}", kind)

    def do_rem(self, each, number):
        kind = self._kind(each)
        a, b = (self.value(operand, kind) for operand in each.operands[1:])
        self._simple(each, f"n.remainder({a}, {b})", kind)

    def _approximate(self, each, number):
        kind, name = self._kind(each), each.parts[0]
        a = self.value(each.operands[1], kind)
        if "rn" in each.parts:
            return self._simple(each, f"n.np.sqrt({a})" if name == "sqrt" else f"n.{kind}(1) / {a}", kind)
        if kind == "f8":
            return self._simple(each, f"m.approximate.reciprocal64({a})", kind) if name == "rcp" else NotImplemented
        self._simple(each, f"m.approximate.{_APPROXIMATE[name]}({a})", kind)

    do_ex2 = do_lg2 = do_rcp = do_sqrt = do_rsqrt = do_tanh = _approximate

    def _extreme(self, each, number):
        kind, name = self._kind(each), each.parts[0]
        a, b = (self.value(operand, kind) for operand in each.operands[1:3])
        if len(each.operands) > 3:
            return NotImplemented
        prefix = "f" if kind[0] == "f" and "NaN" not in each.parts else name + "imum"
        function = f"{prefix}{name}" if prefix == "f" else prefix
        self._simple(each, f"n.np.{function}({a}, {b})", kind)

    do_min = do_max = _extreme

    def do_neg(self, each, number):
        kind = self._kind(each)
        a = self.value(each.operands[1], kind)
        self._simple(each, f"-{a}" if kind[0] == "f" else f"n.{kind}(0) - {a}", kind)

    def do_abs(self, each, number):
        kind = self._kind(each)
        self._simple(each, f"n.np.abs({self.value(each.operands[1], kind)})", kind)

    def _bitwise(self, each, number):
        kind = self._kind(each)
        a, b = (self.value(operand, kind) for operand in each.operands[1:])
        self._simple(each, f"{a} {_BITWISE[each.parts[0]]} {b}", kind)

    do_and = do_or = do_xor = _bitwise

    def do_not(self, each, number):
        kind = self._kind(each)
        self._simple(each, f"~{self.value(each.operands[1], kind)}", kind)

    def _shift(self, each, number):
        kind = self._kind(each)
        a, by = self.value(each.operands[1], kind), each.operands[2]
        bits = 8 * int(kind[1])
        left = each.parts[0] == "shl"
        if not by.startswith("%"):
            amount = int(by, 0)
            if amount >= bits and kind[0] == "u":
                return self._simple(each, f"{a} & {self.constant(getattr(np, f'uint{bits}')(0))}", kind)
            amount = min(amount, bits - 1)
            typed = self.constant(getattr(np, f"{'int' if kind[0] == 'i' else 'uint'}{bits}")(amount))
            return self._simple(each, f"{a} {'<<' if left else '>>'} {typed}", kind)
        function = "shift_left" if left else "shift_right"
        self._simple(each, f"n.{function}({a}, {self.value(by, 'u4')}, {bits})", kind)

    do_shl = do_shr = _shift

    def do_bfe(self, each, number):
        target, a, position, length = each.operands
        if self._kind(each)[1] != "4" or position.startswith("%") or length.startswith("%"):
            return NotImplemented
        signed = self._kind(each)[0] == "i"
        self.put(target, f"n.bit_field({self.value(a, 'u4')}, {position}, {length}, {signed})", "u4", self.guard(each))

    def do_prmt(self, each, number):
        _, a, b, selector = each.operands
        if selector.startswith("%"):
            return NotImplemented
        a, b = self.value(a, "u4"), self.value(b, "u4")
        self._simple(each, f"n.permute_bytes({a}, {b}, {int(selector.rstrip('U'), 0)})", "u4")

    def do_selp(self, each, number):
        kind = self._kind(each)
        _, a, b, chosen = each.operands
        self._simple(each, f"where({self.value(chosen, 'p')}, {self.value(a, kind)}, {self.value(b, kind)})", kind)

    def do_setp(self, each, number):
        comparison, kind = each.parts[1], self._kind(each)
        if (len(each.parts) > 3 and each.parts[2] != "ftz") or len(each.operands) != 3:
            return NotImplemented
        a, b = (self.value(operand, kind) for operand in each.operands[1:])
        if comparison == "num":
            result = f"({a} == {a}) & ({b} == {b})"
        elif comparison == "nan":
            result = f"({a} != {a}) | ({b} != {b})"
        elif kind[0] == "f" and comparison.endswith("u"):
            opposite = {"eq": "!=", "ne": "==", "lt": ">=", "le": ">", "gt": "<=", "ge": "<"}[comparison[:-1]]
            if comparison == "neu":
                result = f"{a} != {b}"
            elif comparison == "equ":
                result = f"~(({a} < {b}) | ({a} > {b}))"
            else:
                result = f"~({a} {opposite} {b})"
        elif kind[0] == "f" and comparison == "ne":
            result = f"({a} < {b}) | ({a} > {b})"
        else:
            result = f"{a} {_COMPARISONS[comparison]} {b}"
        self._simple(each, result, "p")

    def do_cvt(self, each, number):
        parts = each.parts
        if parts[-1] in ("f32",) and parts[-2] in ("bf16x2", "f16x2"):
            high, low = (self.value(operand, "f4") for operand in each.operands[1:])
            kind = "bf" if parts[-2] == "bf16x2" else "f2"
            return self._simple(each, f"m.pack_floats({kind!r}, {low}, {high})", "u4")
        source, target = (("bf" if part == "bf16" else KINDS[part]) for part in (parts[-1], parts[-2]))
        a = self.value(each.operands[1], source)
        rounding = parts[1] if parts[1] in ("rzi", "rni", "rmi", "rpi") else None
        float_source, float_target = source[0] in "fb", target[0] in "fb"
        if source == "bf":
            source = "f4"
        if float_source and not float_target:
            return self._simple(each, f"n.to_integer({a}, n.{target}, {rounding!r})", target)
        if rounding:
            function = {"rzi": "trunc", "rni": "rint", "rmi": "floor", "rpi": "ceil"}[rounding]
            a = f"n.np.{function}({a})"
        if "sat" in parts or any(mode in parts for mode in ("rz", "rm", "rp")):
            return NotImplemented
        if target == "bf":
            return self._simple(each, f"{a}.astype(n.f4)", "bf")
        if float_target or source[1] != target[1]:
            between = target
            if not float_target:  # integers: extended as the source says, or cut
                between = f"{source[0]}{target[1]}"
            return self._simple(each, f"{a}.astype(n.{between})", between)
        self._simple(each, a, source)
