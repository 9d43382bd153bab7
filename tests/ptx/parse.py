"""PTX text, as Triton emits it, into blocks of instructions. Names of the PTX ISA throughout."""

import re
from dataclasses import dataclass, field

WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64}
_LIBRARY = "standard.py"
_ENDS = ("bra", "ret", "exit", "bar", "barrier")  # what follows one of these begins a block


@dataclass(frozen=True)
class Address:
    """[base + offset]; the base is a register, a parameter or a variable."""

    base: str
    offset: int


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple  # str: register, immediate or label; tuple of str: {vector}; Address
    guard: str | None  # "%p1" or "!%p1"
    where: str  # line of the kernel's source

    @property
    def parts(self) -> list[str]:
        """Of the opcode; a program's own shared memory has one name."""
        return self.opcode.replace("shared::cta", "shared").replace("::", "_").split(".")

    def __str__(self) -> str:
        return f"{self.where}: {self.opcode}"


@dataclass
class Block:
    """Instructions of which only the last may branch, wait at a barrier or end; then comes `target` or the next."""

    instructions: list[Instruction] = field(default_factory=list)
    target: int | None = None


@dataclass
class Kernel:
    name: str
    threads: int
    parameters: list[tuple[str, int]]  # name and bytes
    widths: dict[str, int]  # of registers by prefix, "%r" -> 32
    blocks: list[Block]

    @property
    def instructions(self) -> list[Instruction]:
        return [each for block in self.blocks for each in block.instructions]


def split(text: str, separator: str = ",") -> list[str]:
    """Parts of `text` between separators outside brackets."""
    found, depth, begin = [], 0, 0
    for index, letter in enumerate(text):
        depth += letter in "{[" or -(letter in "}]")
        if letter == separator and not depth:
            found.append(text[begin:index].strip())
            begin = index + 1
    return [*found, text[begin:].strip()]


def _operand(text: str):
    if text.startswith("{"):
        return tuple(split(text[1:-1]))
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return Address(base.strip(), int(offset or "0", 0))
    return text


def _statements(body: str, files: dict[str, str]):
    """(label or None, statement or None, line of the kernel's source) in order."""
    where = "?"
    for line in body.splitlines():
        code, _, comment = line.partition("//")
        code = code.strip()
        if code.startswith(".loc"):
            # Inside Triton's own functions, the line that calls them; it may be that of the .loc before.
            caller = re.search(r"inlined_at (\d+) (\d+)", code)
            if files.get(code.split()[1]) != _LIBRARY:
                where = ":".join(comment.strip().split(":")[:2]) or where
            elif caller and files.get(caller.group(1), _LIBRARY) != _LIBRARY:
                where = f"{files[caller.group(1)]}:{caller.group(2)}"
            continue
        if code.startswith(".pragma"):
            continue
        if label := re.match(r"(\$\w+):", code):
            yield label.group(1), None, where
            continue
        if code.startswith("{") and not code.endswith(";"):
            code = code[1:]
        elif re.match(r"\{\s*\.reg", code):  # a scope on one line
            code = code[1:].rstrip().removesuffix("}")
        for statement in split(code, ";"):
            if statement.strip("{} ") and not statement.startswith(".reg"):
                yield None, statement.lstrip("}").strip(), where


def parse(text: str) -> Kernel:
    """The one kernel of a module."""
    name = re.search(r"\.entry (\w+)\(", text).group(1)
    parameters = [
        (each.group(2), int(each.group(1)) // 8)
        for each in re.finditer(r"\.param \.[a-z](\d+) [^,\n]*?(\w+),?\n", text[: text.index(".reqntid")])
    ]
    body = text[text.index("\n{", text.index(".reqntid")) + 2 :]
    body = body[: body.index("\n}")]
    widths = {each.group(2): WIDTHS[each.group(1)] for each in re.finditer(r"\.reg \.(\w+)\s+(%\w+)<", body)}
    files = {each.group(1): each.group(2) for each in re.finditer(r'\.file\s+(\d+) "(?:.*/)?([^/"\n]+)"', text)}
    statements = list(_statements(body, files))
    targets = {s.split()[-1] for _, s, _ in statements if s and re.match(r"(@\S+ )?\s*bra\b", s)}
    blocks, labels = [Block()], {}
    for label, statement, where in statements:
        if label is not None:
            if label in targets:
                if blocks[-1].instructions:
                    blocks.append(Block())
                labels[label] = len(blocks) - 1
            continue
        guard = None
        if statement.startswith("@"):
            guard, statement = statement[1:].split(maxsplit=1)
        opcode, *rest = statement.split(maxsplit=1)
        operands = tuple(_operand(each) for each in split(rest[0])) if rest else ()
        blocks[-1].instructions.append(Instruction(opcode, operands, guard, where))
        if opcode.split(".")[0] in _ENDS and not opcode.startswith("bar.warp"):
            blocks.append(Block())
    if not blocks[-1].instructions:
        blocks.pop()
    for block in blocks:
        last = block.instructions[-1]
        if last.opcode.startswith("bra"):
            block.target = labels[last.operands[0]]
    threads = int(re.search(r"\.reqntid (\d+)", text).group(1))
    return Kernel(name, threads, parameters, widths, blocks)
