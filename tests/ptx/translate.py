"""Blocks of PTX into Python functions on numpy arrays: an instruction is one operation on all threads of a launch.

A block computes for every thread, and at its end keeps the results of those that are in it; only what has an effect
outside registers is told who they are. Registers are unsigned arrays, one element a thread, or scalars where all agree;
an instruction views them as it wants to.
"""

import re
from collections import Counter

import numpy as np

from . import numbers
from .arithmetic import Unknown, register_name
from .movement import Translator
from .parse import Address, Block, Instruction, Kernel


def used(kernel_or_block: Kernel | Block) -> set[str]:
    """Registers that instructions mention."""
    return {name for each in kernel_or_block.instructions for name in re.findall(r"%[a-z]+\d+", _text(each))}


def _text(each: Instruction) -> str:
    return f"{each.guard} " + " ".join(op.base if isinstance(op, Address) else str(op) for op in each.operands)


def translate(kernel: Kernel, symbols: dict[str, int]) -> tuple[list, list[str]]:
    """A function for each block, and the registers' names in the order of R.

    block(m, R, mask, full) -> who branches, or None for all or nobody; m is the machine, `full` says that `mask` is.
    """
    registers = sorted(used(kernel))
    index = {name: i for i, name in enumerate(registers)}
    mentions = [used(block) for block in kernel.blocks]
    where = Counter(name for names in mentions for name in names)
    functions, number = [], 0
    for position, block in enumerate(kernel.blocks):
        translator = Translator(kernel, symbols)
        branch = "None"
        for each in block.instructions:
            if each.opcode.split(".")[0] in ("bra", "ret", "exit", "bar") and not each.opcode.startswith("bar.warp"):
                branch = _check_end(each, translator) or "None"
            else:
                translator.instruction(each, number)
            number += 1
        functions.append(_function(position, block, translator, branch, mentions[position], where, index))
    return functions, registers


def _check_end(each: Instruction, translator: Translator) -> str | None:
    name = each.opcode.split(".")[0]
    if name == "bra":
        return translator.guard(each)
    if each.guard or (name == "bar" and (each.opcode, each.operands) != ("bar.sync", ("0",))):
        raise Unknown(str(each))
    return None


def _function(position, block: Block, translator: Translator, branch, mentioned, where, index):
    """Loads registers that other blocks know, or that the block reads before it writes them; stores the former."""
    shared = sorted(name for name in mentioned if where[name] > 1)
    body = translator.lines
    own = _read_first([*body, branch], mentioned - set(shared))
    source = ["def block(m, R, mask, full):"]
    source += [f"    {register_name(name)} = R[{index[name]}]" for name in (*shared, *own)]
    source += [f"    {line}" for line in body]
    assigned = {name for line in body for name in re.findall(r"^(\w+) = ", line)}
    kept = [name for name in (*shared, *own) if register_name(name) in assigned]
    if kept:
        source.append("    if full:")
        source += [f"        R[{index[name]}] = {register_name(name)}" for name in kept]
        source.append("    else:")
        source += [f"        R[{index[name]}] = where(mask, {register_name(name)}, R[{index[name]}])" for name in kept]
    source.append(f"    return {branch}")
    namespace = {"n": numbers, "where": np.where, **translator.constants}
    exec(compile("\n".join(source), f"<block {position}>", "exec"), namespace)
    return namespace["block"]


def _read_first(lines: list[str], names: set[str]) -> list[str]:
    """Of these registers, which some line reads before any has written it."""
    waiting, found = {register_name(name): name for name in names}, []
    for line in lines:
        target, _, rest = line.partition(" = ")
        for name in re.findall(r"\b(?:p|rs|rd|r|fd|f)\d+\b", rest if target.isidentifier() else line):
            if name in waiting:
                found.append(waiting.pop(name))
        waiting.pop(target, None)
    return sorted(found)
