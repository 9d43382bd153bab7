"""Compiles a kernel without a GPU and reads its machine code; not in a process that interprets (TRITON_INTERPRET)."""

import re
import subprocess
import tempfile
from pathlib import Path

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes a program
_SHORTEST_LOOP = 8  # instructions; what is shorter waits for something, or pads the code


def compile_for(compilation, target: str = "sm_90"):
    """`triton.compile` as a launch would: pointers, and integers marked ":16", are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = compilation.kernel.arg_names
    signature = {name: compilation.signature.get(name, "constexpr") for name in names}
    sixteen = [names.index(name) for name, kind in signature.items() if kind.startswith("*") or kind.endswith(":16")]
    if tuple(map(int, triton.__version__.split(".")[:2])) == (3, 2):  # there, constants are not in the signature
        from triton.backends.compiler import AttrsDescriptor

        signature = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        attrs = AttrsDescriptor.from_dict({"arg_properties": {"tt.divisibility": sixteen}, "cls": "AttrsDescriptor"})
    else:
        attrs = {(index,): [["tt.divisibility", 16]] for index in sixteen}
    signature = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    source = ASTSource(compilation.kernel, signature, dict(compilation.constexprs), attrs)
    options = {"num_warps": compilation.num_warps, "num_stages": compilation.num_stages, **compilation.options}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def figures(compilation, compiled) -> dict:
    """What a compiled sm_90 kernel takes and does, and its opcodes in order."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        commands = [[tools / "cuobjdump", "-res-usage", file.name], [tools / "nvdisasm", "-c", file.name]]
        usage, listing = (subprocess.run(c, check=True, capture_output=True, text=True).stdout for c in commands)
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL"))
    shared = compiled.metadata.shared
    opcodes, (begin, end) = _parse(listing)
    loop, threads = opcodes[begin:end], 32 * compilation.num_warps
    elements = compilation.elements / threads
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": shared,
        "programs": _programs_a_multiprocessor(registers, shared, compilation.num_warps),
        "code": 16 * len(opcodes),
        "per_element": round(len(loop) / elements, 3) if elements and loop else None,
        "barriers": sum(opcode.startswith("BAR") for opcode in loop),
        "matrix": sum(bool(re.match(r"[HQIBD]G?MMA", opcode)) for opcode in opcodes),
        "opcodes": opcodes,
    }


def _parse(listing: str) -> tuple[list[str], tuple[int, int]]:
    """Opcodes of a listing by nvdisasm; begin and end of its hot loop, the longest of the most deeply nested; (0, 0)
    without one."""
    opcodes, labels, branches = [], {}, []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(opcodes)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line):
            opcodes.append(instruction.group(1))
            if target := re.search(r"\sBRA\S*\s.*(\.L_x_\d+)", line):
                branches.append((target.group(1), len(opcodes)))
    ends = {}
    for label, end in branches:
        begin = labels.get(label, end)
        if end - begin >= _SHORTEST_LOOP:
            ends[begin] = max(end, ends.get(begin, 0))
    # A branch back from a rare case, moved behind the code, looks like a loop that overlaps the one it is of.
    loops = [(b, e) for b, e in ends.items() if not any(begin < b < end < e for begin, end in ends.items())]

    def depth_and_length(loop):
        return sum(begin <= loop[0] and loop[1] <= end for begin, end in loops), loop[1] - loop[0]

    return opcodes, max(loops, key=depth_and_length, default=(0, 0))


def _programs_a_multiprocessor(registers: int, shared: int, num_warps: int) -> int:
    """Programs that are resident at a time on sm_90: 65,536 registers, 228 KiB of shared memory, 64 warps."""
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * num_warps)
    return min(by_registers, (228 << 10) // (shared + 1024), 64 // num_warps, 32)
