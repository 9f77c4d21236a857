# SPDX-License-Identifier: Apache-2.0
"""Machine code as NVIDIA's disassembler prints it: instructions, main loop, what it overwrites."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

TENSOR_CORE_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA")
_LABEL = re.compile(r"\s*(\.L_\S+):")
_INSTRUCTION = re.compile(
    r"\s/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*)"
)
_PREDICATE = re.compile(r"!?U?P(?:\d|T)")
_REGISTER = re.compile(r"R(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One line of machine code.

    Attributes:
        opcode: with its modifiers, such as LDG.E.128.
        operands: separated by commas, as the disassembler prints them.
    """

    opcode: str
    operands: str

    @property
    def kind(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    def written(self) -> range:
        """Numbers of the registers that it writes; none for tensor cores, which write sums."""
        kind = self.kind
        if kind in ("HGMMA", "WARPSYNC", "BAR", "R2P") or "SETP" in kind or kind.startswith("BR"):
            return range(0)
        operands = [operand.strip() for operand in self.operands.split(",")]
        while operands and _PREDICATE.fullmatch(operands[0]):
            del operands[0]
        register = _REGISTER.match(operands[0]) if operands else None
        if register is None:
            return range(0)
        first = int(register[1])
        return range(first, first + self._width())

    def _width(self) -> int:
        """Registers of the result: the widest that the modifiers may mean."""
        modifiers = self.opcode.split(".")[1:]
        if "128" in modifiers or "4" in modifiers or self.kind in ("HMMA", "IMMA"):
            return 4
        two = {"64", "WIDE", "2"} & set(modifiers)
        if two or self.kind[0] == "D" or (self.kind == "CS2R" and "32" not in modifiers):
            return 2
        return 1


def parse(text: str) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    """Instructions of a disassembly, and for each label the index of the one that follows it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.search(line):
            instructions.append(Instruction(found["opcode"], found["operands"].strip()))
    return tuple(instructions), labels


def main_loop(
    instructions: Sequence[Instruction], labels: Mapping[str, int]
) -> tuple[Instruction, ...]:
    """The shortest stretch between a backward branch and its aim that uses tensor cores."""
    loops = []
    for index, instruction in enumerate(instructions):
        aim = re.search(r"\.L_\w+", instruction.operands) if instruction.kind == "BRA" else None
        if aim and labels.get(aim[0], index + 1) <= index:
            loops.append(tuple(instructions[labels[aim[0]] : index + 1]))
    with_tensor_cores = [
        loop for loop in loops if any(each.kind in TENSOR_CORE_INSTRUCTIONS for each in loop)
    ]
    return min(with_tensor_cores, key=len, default=())


def count_kinds(instructions: Iterable[Instruction]) -> Counter[str]:
    """Instructions by kind; loads from global memory as LDG.32, LDG.64 and LDG.128."""
    counts: Counter[str] = Counter()
    for instruction in instructions:
        kind = instruction.kind
        if kind == "LDG":
            width = {"U8", "U16", "64", "128"} & set(instruction.opcode.split("."))
            kind = f"LDG.{width.pop() if width else '32'}"
        counts[kind] += 1
    return counts


def overwritten_operands(loop: Sequence[Instruction]) -> list[str]:
    """What in a loop writes a register while Hopper's tensor cores may still read it.

    `HGMMA.64xNx16.F32.BF16 Racc, Ra, gdesc[..], Racc` reads Ra to Ra + 3 some time after it was
    issued. One marked gsb0 ends a group; `WARPGROUP.DEPBAR.LE gsb0, n` waits until n groups are
    left at most, oldest first. The loop is followed for two turns, for what one leaves to the next.

    Returns:
        A line for each such instruction, empty if there is none.
    """
    found = []
    groups: deque[set[int]] = deque()
    current: set[int] = set()
    for position, instruction in enumerate([*loop, *loop]):
        text = f"{instruction.opcode} {instruction.operands}"
        if instruction.kind == "HGMMA":
            current |= _left_operand(instruction)
            if "gsb0" in instruction.operands:
                groups.append(current)
                current = set()
        elif instruction.opcode == "WARPGROUP.DEPBAR.LE":
            left = int(instruction.operands.split(",")[1], 16)
            while len(groups) > left:
                groups.popleft()
        elif set(instruction.written()) & current.union(*groups):
            found.append(f"{position % len(loop)}: {text}")
    return list(dict.fromkeys(found))


def _left_operand(instruction: Instruction) -> set[int]:
    """Registers of the left operand of an HGMMA; empty if it comes from shared memory."""
    register = _REGISTER.match(instruction.operands.split(",")[1].strip())
    first = int(register[1]) if register else 0
    return set(range(first, first + 4)) if register else set()
