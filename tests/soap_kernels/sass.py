"""Executes the integer part of sm_80 machine code, to count what a warp of a kernel does without a GPU.

A cubin is disassembled and run a warp at a time: registers hold 32 numbers and, of each, whether it is known.
Addresses, indices, predicates and loop counters follow from the kernel's parameters and the thread's indices and are
computed; what is loaded from memory and all floating-point arithmetic is unknown. A branch on something unknown is an
error, so every loop's trips and every branch taken are those of the real launch. Lanes that part meet again at the
lowest address.
"""

from __future__ import annotations

import re
import struct
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LANES = 32
PARAMETERS = 0x160  # where they begin in constant bank 0 on sm_80
ZERO = {"RZ", "URZ", "SRZ"}
U32 = NDArray[np.uint32]
Bits = NDArray[np.bool_]
ALL: Bits = np.ones(LANES, dtype=bool)
NONE: Bits = np.zeros(LANES, dtype=bool)
NOTHING: U32 = np.zeros(LANES, dtype=np.uint32)
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;")
_REGISTER = re.compile(r"^([-~]?)(U?R\d+|U?RZ|SRZ)(?:\.\w+)?$")
_CONSTANT = re.compile(r"^([-~]?)c\[0x([0-9a-f]+)\]\[(?:(U?R\w+)\+?)?(-?0x[0-9a-f]+)?\]$")
_NUMBER = re.compile(r"^-?0x[0-9a-f]+$")
_INSTRUCTION = re.compile(r"^(?:@(!?)(U?P\w+)\s+)?([A-Z][A-Z0-9_.a-z]*)\s*(.*)$")


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str | None
    negated: bool
    name: str
    operands: tuple[str, ...]

    @cached_property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.name.split("."))

    @cached_property
    def registers(self) -> int:
        """How many registers the first register operand stands for."""
        base, parts = self.parts[0], self.parts
        if base == "HMMA":
            return 4 if "F32" in parts else 2
        if base == "LDSM":
            return int(parts[-1]) if parts[-1].isdigit() else 1
        if "128" in parts:
            return 4
        if "64" in parts or "WIDE" in parts or (base == "CS2R" and "32" not in parts) or "U64" in parts:
            return 2
        return 1

    @cached_property
    def jumps(self) -> bool:
        return self.parts[0] in ("BRA", "BRX", "BRXU", "EXIT", "CALL", "RET", "JMP")

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """The predicates and registers that it writes, as far as no handler knows better."""
        if self.parts[0] in ("BSSY", "BSYNC", "BAR", "WARPSYNC", "NOP", "DEPBAR", "LDGDEPBAR", "CCTL", "STS", "STG"):
            return ()
        found: list[str] = []
        for text in self.operands[:2]:
            if re.match(r"^U?P(\d|T)$", text):
                found.append(text)
                continue
            if (register := re.match(r"^(U?R)(\d+)", text)) and (not found or found[0].lstrip("U").startswith("P")):
                found += [f"{register[1]}{int(register[2]) + n}" for n in range(self.registers)]
            break
        return tuple(found)


@dataclass(frozen=True)
class Access:
    """One warp's access to device memory."""

    address: int  # of the instruction
    write: bool
    width: int  # bytes a lane
    lanes: tuple[int, ...]  # byte addresses of the lanes that take part


@dataclass
class Run:
    """What the warps of a block did."""

    accesses: list[Access] = field(default_factory=list)
    by_address: Counter[int] = field(default_factory=Counter)  # how often each instruction was issued

    @property
    def total(self) -> int:
        return self.by_address.total()


def disassemble(tool: str, cubin: Path) -> dict[str, list[Instruction]]:
    """Instructions by kernel; ``tool``: cuobjdump."""
    text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels: dict[str, list[Instruction]] = {}
    name = ""
    for line in text.splitlines():
        if found := re.search(r"Function : (\S+)", line):
            name = found[1]
            kernels[name] = []
        elif found := _LINE.match(line):
            kernels[name].append(parse(int(found[1], 16), found[2]))
    return kernels


def parse(address: int, text: str) -> Instruction:
    found = _INSTRUCTION.match(re.sub(r"\(\*.*?\*\)|\{.*?\}", "", text).strip())
    assert found, text
    negated, guard, name, rest = found.groups()
    operands = tuple(o.strip().replace(".reuse", "") for o in rest.split(",")) if rest.strip() else ()
    return Instruction(address, guard, bool(negated), name, operands)


def constant_bank(cubin: Path, kernel: str, bank: int) -> bytes:
    """A kernel's constants as the compiler wrote them: jump tables and the like."""
    data = cubin.read_bytes()
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + k * size) for k in range(count)]
    strings = headers[names_at][4]
    for name_at, _, _, _, offset, length in headers:
        end = data.index(b"\0", strings + name_at)
        if data[strings + name_at : end].decode() == f".nv.constant{bank}.{kernel}":
            return data[offset : offset + length]
    return b""


class Machine:
    """One kernel with the constants of one launch."""

    def __init__(
        self,
        code: list[Instruction],
        parameters: bytes,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        bank2: bytes = b"",
    ) -> None:
        self.code = {i.address: i for i in code}
        head = bytearray(PARAMETERS)
        struct.pack_into("<6I", head, 0, *block, *grid)
        self.banks = {0: bytes(head) + parameters, 2: bank2}
        self.threads = int(np.prod(block))
        self.fixed: dict[tuple[str, int, bool], tuple[U32, Bits]] = {}  # operands that are the same for all warps

    def run_block(self, block: tuple[int, int, int], limit: int = 2_000_000) -> Run:
        run = Run()
        for first in range(0, self.threads, LANES):
            Warp(self, block, first, run).run(limit)
        return run


def _signed(v: U32) -> NDArray[np.int64]:
    return v.view(np.int32).astype(np.int64)


def _low(v: NDArray[np.int64]) -> U32:
    return (v & 0xFFFFFFFF).astype(np.uint32)


def _with_sign(sign: str, v: U32) -> U32:
    return ~v if sign == "~" else _low(-_signed(v)) if sign == "-" else v


class Warp:
    def __init__(self, machine: Machine, block: tuple[int, int, int], first: int, run: Run) -> None:
        self.machine, self.block, self.out = machine, block, run
        self.thread = np.arange(first, first + LANES, dtype=np.uint32)
        self.values: dict[str, U32] = {}
        self.known: dict[str, Bits] = {}
        self.pc = np.zeros(LANES, dtype=np.int64)
        self.live = ALL
        self.active = ALL

    # Operands -------------------------------------------------------------------------------------------------------

    def _constant(self, bank: int, offset: int, size: int) -> tuple[int, bool]:
        data = self.machine.banks.get(bank, b"")
        if not 0 <= offset <= len(data) - size:
            return 0, False
        return int.from_bytes(data[offset : offset + size], "little"), True

    def register(self, name: str) -> tuple[U32, Bits]:
        if name in ZERO:
            return NOTHING, ALL
        if name not in self.values:  # read before written: flags kept as the bits of a register begin so
            self.values[name] = np.zeros(LANES, dtype=np.uint32)
            self.known[name] = ALL
        return self.values[name], self.known[name]

    def value(self, text: str, size: int = 4, high: bool = False) -> tuple[U32, Bits]:
        """An operand's 32 bits; ``high``: of a 64-bit operand the upper ones."""
        if found := _REGISTER.match(text):
            sign, name = found.groups()
            if high and name not in ZERO:
                prefix = name.rstrip("0123456789")
                name = f"{prefix}{int(name.removeprefix(prefix)) + 1}"
            v, k = self.register(name)
        elif (text, size, high) in self.machine.fixed:
            return self.machine.fixed[text, size, high]
        elif text.startswith("|"):
            v, k = self.value(text.strip("|"), size, high)
            return np.abs(_signed(v)).astype(np.uint32), k
        elif found := _CONSTANT.match(text):
            sign, bank, index, number = found.groups()
            offset = int(number or "0", 16) + (4 if high else 0)
            if index:
                at, k = self.register(index)
                lanes = [self._constant(int(bank, 16), int(n) + offset, size) for n in _signed(at)]
                v, k = np.array([n for n, _ in lanes], dtype=np.uint32), k & np.array([known for _, known in lanes])
            else:
                n, known = self._constant(int(bank, 16), offset, size)
                v, k = np.full(LANES, n, dtype=np.uint32), np.full(LANES, known)
                self.machine.fixed[text, size, high] = _with_sign(sign, v), k
        else:
            sign, known = "", _NUMBER.match(text) is not None  # else a float, or something not modelled
            v, k = np.full(LANES, int(text, 16) & 0xFFFFFFFF if known else 0, dtype=np.uint32), np.full(LANES, known)
            self.machine.fixed[text, size, high] = v, k
        return _with_sign(sign, v), k

    def predicate(self, text: str) -> tuple[Bits, Bits]:
        negated, name = text.startswith("!"), text.lstrip("!")
        if name in ("PT", "UPT"):
            v, k = ALL, ALL
        else:
            if name not in self.values:
                self.values[name] = np.zeros(LANES, dtype=np.uint32)
                self.known[name] = np.zeros(LANES, dtype=bool)
            v, k = self.values[name] != 0, self.known[name]
        return (~v if negated else v), k

    def set(self, name: str, value: U32 | Bits, known: Bits, mask: Bits, certain: Bits) -> None:
        """``mask``: lanes that may write; ``certain``: of which it is known that they do."""
        name = name.split(".")[0]
        if name in ZERO or name in ("PT", "UPT"):
            return
        if mask is ALL and certain is ALL and name[0] != "U":
            self.values[name], self.known[name] = value if value.dtype == np.uint32 else value.astype(np.uint32), known
            return
        old, old_known = self.register(name)
        value = np.asarray(value).astype(np.uint32)
        if name[0] == "U":  # one for the warp
            first = int(np.argmax(mask)) if mask.any() else -1
            if first >= 0:
                self.values[name] = np.full(LANES, value[first])
                self.known[name] = np.full(LANES, bool(known[first] and certain[first]))
            return
        self.values[name] = np.where(mask, value, old)
        self.known[name] = np.where(mask, known & certain, old_known)

    # Running --------------------------------------------------------------------------------------------------------

    def run(self, limit: int) -> None:
        code = self.machine.code
        for _ in range(limit):
            if not self.live.any():
                return
            at = int(self.pc[self.live].min())
            here = self.pc == at
            self.active = ALL if here.all() else self.live & here
            # Until something jumps, all that is here goes on from line to line, as far as another lane waits there.
            others = self.pc[self.live & ~self.active]
            stop = int(others.min()) if others.size else 1 << 62
            while at < stop:
                i = code[at]
                at += 16
                if i.jumps:
                    self.pc[self.active] = at
                    self.step(i)
                    break
                self.step(i)
            else:
                self.pc[self.active] = at
        raise RuntimeError("the kernel runs on and on")

    def step(self, i: Instruction) -> None:
        self.out.by_address[i.address] += 1
        mask, certain = self.active, ALL
        if i.guard:
            v, k = self.predicate(("!" if i.negated else "") + i.guard)
            mask, certain = self.active & (v | ~k), k
        if i.jumps:
            if not certain[self.active].all():
                raise RuntimeError(f"{i.address:#x}: a branch on what is not known: {i}")
            self.jump(i, mask)
            return
        base = i.parts[0]
        handler: Callable[[Instruction, Bits, Bits], bool] | None = getattr(self, f"do_{base}", None)
        if base.startswith("U") and handler is None:
            handler = getattr(self, f"do_{base[1:]}", None)
        if handler is None or not handler(i, mask, certain):
            for name in i.targets:
                self.set(name, NOTHING, NONE, mask, ALL)

    def jump(self, i: Instruction, mask: Bits) -> None:
        base = i.parts[0]
        if base == "EXIT":
            self.live = self.live & ~mask
            self.pc[mask] = -1
            return
        if "DIV" in i.parts:
            return
        if base in ("BRX", "BRXU"):
            v, k = self.value(i.operands[0].split()[0])
            offset = int(i.operands[0].split()[1], 16)
            if not k[mask].all():
                raise RuntimeError(f"{i.address:#x}: a jump to what is not known")
            self.pc[mask] = i.address + 16 + _signed(v)[mask] + offset
        elif base == "RET":
            v, k = self.value(i.operands[0].split()[0])
            if not k[mask].all():
                raise RuntimeError(f"{i.address:#x}: a return to what is not known")
            self.pc[mask] = _signed(v)[mask]
        else:
            if len(i.operands) > 1 and i.operands[0].lstrip("!").startswith(("P", "UP")):
                v, k = self.predicate(i.operands[0])
                if not k[mask].all():
                    raise RuntimeError(f"{i.address:#x}: a branch on what is not known: {i}")
                mask = mask & v
            self.pc[mask] = int(i.operands[-1].split()[-1], 16)

    def put(
        self, i: Instruction, v: U32 | NDArray[np.int64], known: Bits, mask: Bits, certain: Bits, at: int = 0
    ) -> bool:
        out = v if v.dtype == np.uint32 else _low(v.astype(np.int64))
        self.set(i.operands[at], out, known, mask, certain)
        return True

    def put_pair(self, name: str, v: NDArray[np.uint64], known: Bits, mask: Bits, certain: Bits) -> bool:
        if name in ZERO:
            return True
        prefix, number = re.match(r"^(U?R)(\d+)", name).groups()  # type: ignore[union-attr]
        self.set(name, (v & np.uint64(0xFFFFFFFF)).astype(np.uint32), known, mask, certain)
        self.set(f"{prefix}{int(number) + 1}", (v >> np.uint64(32)).astype(np.uint32), known, mask, certain)
        return True

    # Instructions: True if done, False if the result is not known ----------------------------------------------------

    def do_S2R(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        special = {
            "SR_TID.X": self.thread,
            "SR_TID.Y": np.zeros(LANES, dtype=np.uint32),
            "SR_TID.Z": np.zeros(LANES, dtype=np.uint32),
            "SR_LANEID": self.thread & np.uint32(31),
            "SR_CTAID.X": np.full(LANES, self.block[0], dtype=np.uint32),
            "SR_CTAID.Y": np.full(LANES, self.block[1], dtype=np.uint32),
            "SR_CTAID.Z": np.full(LANES, self.block[2], dtype=np.uint32),
        }
        if i.operands[1] not in special:
            return False
        return self.put(i, special[i.operands[1]], ALL, mask, certain)

    do_S2UR = do_S2R

    def do_CS2R(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        if i.operands[1] != "SRZ":
            return False
        zero = np.zeros(LANES, dtype=np.uint64)
        if "32" in i.parts:
            return self.put(i, zero.astype(np.uint32), ALL, mask, certain)
        return self.put_pair(i.operands[0], zero, ALL, mask, certain)

    def do_MOV(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        return self.put(i, *self.value(i.operands[1]), mask, certain)

    def do_HFMA2(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        """The way to set a constant that costs another unit: -0 * 0 + a pair of halves."""
        if tuple(i.operands[1:3]) != ("-RZ", "RZ"):
            return False
        high, low = (int(np.float16(float(o)).view(np.uint16)) for o in i.operands[3:5])
        return self.put(i, np.full(LANES, high << 16 | low, dtype=np.uint32), ALL, mask, certain)

    def do_R2UR(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        return self.put(i, *self.value(i.operands[1]), mask, certain)

    def do_LDC(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        if "64" in i.parts:
            low, k = self.value(i.operands[1])
            high, kh = self.value(i.operands[1], high=True)
            pair = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
            return self.put_pair(i.operands[0], pair, k & kh, mask, certain)
        size = 1 if "U8" in i.parts else 2 if "U16" in i.parts else 4
        return self.put(i, *self.value(i.operands[1], size), mask, certain)

    def do_IMAD(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        unsigned = "U32" in i.parts
        ops = list(i.operands)
        if "X" in i.parts:  # d, a, b, c, carry
            (a, ka), (b, kb), (c, kc) = (self.value(o) for o in ops[1:4])
            p, kp = self.predicate(ops[4]) if len(ops) > 4 else (~ALL, ALL)
            out = _signed(a) * _signed(b) + _signed(c) + p
            return self.put(i, out, ka & kb & kc & kp, mask, certain)
        if "WIDE" in i.parts:
            carry = 1 if re.match(r"^P\d", ops[1]) else 0
            (a, ka), (b, kb) = (self.value(o) for o in ops[1 + carry : 3 + carry])
            low, kl = self.value(ops[3 + carry])
            high, kh = self.value(ops[3 + carry], high=True)
            if unsigned:
                product = a.astype(np.uint64) * b.astype(np.uint64)
            else:
                product = (_signed(a) * _signed(b)).view(np.uint64)
            with np.errstate(over="ignore"):
                total = product + (low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32))
            if carry:
                self.set(ops[1], total < product, ka & kb & kl & kh, mask, certain)
            return self.put_pair(ops[0], total, ka & kb & kl & kh, mask, certain)
        (a, ka), (b, kb), (c, kc) = (self.value(o) for o in ops[1:4])
        known = ka & kb & kc
        zero = (ka & (a == 0)) | (kb & (b == 0))
        known = known | (zero & kc)
        if "HI" in i.parts:
            if len(ops) > 3 and ops[3] not in ZERO:
                high, kh = self.value(ops[3], high=True)
            else:
                high, kh = NOTHING, ALL
            if unsigned:
                product = a.astype(np.uint64) * b.astype(np.uint64)
            else:
                product = (_signed(a) * _signed(b)).view(np.uint64)
            with np.errstate(over="ignore"):
                total = product + (c.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32))
            return self.put(i, (total >> np.uint64(32)).astype(np.uint32), known & kh, mask, certain)
        with np.errstate(over="ignore"):
            out = (a.astype(np.uint64) * b.astype(np.uint64) + c.astype(np.uint64)) & np.uint64(0xFFFFFFFF)
        return self.put(i, out.astype(np.uint32), known, mask, certain)

    def do_IADD3(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        ops = list(i.operands)
        outs = []
        while re.match(r"^U?P(\d|T)$", ops[1]):
            outs.append(ops.pop(1))
        total, known = np.zeros(LANES, dtype=np.int64), ALL
        extended = "X" in i.parts
        for text in ops[1:4]:
            negative = text.startswith("-")
            v, k = self.value(text.lstrip("-"))
            known = known & k
            if negative:  # two's complement, so that a carry comes out as the hardware has it
                v = ~v
                total = total + v.astype(np.int64) + 1
            else:
                total = total + v.astype(np.int64)
        if extended:
            for text in ops[4:]:
                p, k = self.predicate(text)
                total, known = total + p, known & k
        for n, out in enumerate(outs):
            self.set(out, ((total >> 32) > n), known, mask, certain)
        return self.put(i, _low(total), known, mask, certain)

    def do_LEA(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        ops = list(i.operands)
        out = ops.pop(1) if re.match(r"^U?P(\d|T)$", ops[1]) else None
        (a, ka), (b, kb) = self.value(ops[1]), self.value(ops[2])
        if "HI" in i.parts:
            if "SX32" in i.parts:
                c, kc = (a.view(np.int32) >> 31).view(np.uint32), ka
                rest = ops[3:]
            else:
                c, kc = self.value(ops[3])
                rest = ops[4:]
            shift = int(rest[0], 16)
            wide = a.astype(np.uint64) | c.astype(np.uint64) << np.uint64(32)
            shifted = (wide << np.uint64(shift)) >> np.uint64(32)
            total, known = (shifted & np.uint64(0xFFFFFFFF)).astype(np.int64) + b, ka & kb & kc
            if "X" in i.parts and len(rest) > 1:
                p, kp = self.predicate(rest[1])
                total, known = total + p, known & kp
        else:
            shift = int(ops[3], 16) if len(ops) > 3 else 0
            total = ((a.astype(np.int64) << shift) & 0xFFFFFFFF) + b.astype(np.int64)
            known = ka & kb
        if out:
            self.set(out, total >> 32 != 0, known, mask, certain)
        return self.put(i, _low(total), known, mask, certain)

    def do_LOP3(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        ops = list(i.operands)
        out = ops.pop(0) if re.match(r"^U?P(\d|T)$", ops[0]) else None
        (a, ka), (b, kb), (c, kc) = (self.value(o) for o in ops[1:4])
        lut = int(ops[4], 16)
        v = np.zeros(LANES, dtype=np.uint32)
        for bit in range(8):
            if lut >> bit & 1:
                v = v | ((a if bit & 4 else ~a) & (b if bit & 2 else ~b) & (c if bit & 1 else ~c))
        known = ka & kb & kc
        if lut == 0xC0:
            known = known | (ka & (a == 0)) | (kb & (b == 0))
        self.set(ops[0], v, known, mask, certain)
        if out:
            self.set(out, v != 0, known, mask, certain)
        return True

    def do_SHF(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        (low, kl), (s, ks), (high, kh) = (self.value(o) for o in i.operands[1:4])
        left, wide, top = "L" in i.parts, "U64" in i.parts or "S64" in i.parts, "HI" in i.parts
        signed = "S32" in i.parts or "S64" in i.parts
        shift = (
            s.astype(np.int64) & (63 if wide else 31)
            if "W" in i.parts
            else np.minimum(s.astype(np.int64), 63 if wide else 32)
        )
        both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        if left:
            out = both << shift.astype(np.uint64)
        elif signed:
            out = (both.view(np.int64) >> shift).view(np.uint64)
        else:
            out = both >> shift.astype(np.uint64)
        if top:
            out = out >> np.uint64(32)
        return self.put(i, (out & np.uint64(0xFFFFFFFF)).astype(np.uint32), kl & ks & kh, mask, certain)

    def do_ISETP(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        first, second, at, bt, *rest = i.operands
        (a, ka), (b, kb) = self.value(at), self.value(bt)
        x, y = (a.astype(np.int64), b.astype(np.int64)) if "U32" in i.parts else (_signed(a), _signed(b))
        compare = i.parts[1]
        v = {"EQ": x == y, "NE": x != y, "LT": x < y, "LE": x <= y, "GT": x > y, "GE": x >= y}[compare]
        known = ka & kb
        if "EX" in i.parts:
            lower, kp = self.predicate(rest[1])
            known = known & kp
            if compare == "EQ":
                v = v & lower
            elif compare == "NE":
                v = v | lower
            else:
                v = np.where(x == y, lower, v)
        other, ko = self.predicate(rest[0]) if rest else (ALL, ALL)
        self.combine(i, first, second, (v, known), (other, ko), mask, certain)
        return True

    def combine(
        self,
        i: Instruction,
        first: str,
        second: str,
        a: tuple[Bits, Bits],
        b: tuple[Bits, Bits],
        mask: Bits,
        certain: Bits,
    ) -> None:
        (v, known), (other, ko) = a, b
        for target, w in ((first, v), (second, ~v)):
            if "OR" in i.parts:
                sure = (known & ko) | (known & w) | (ko & other)
                self.set(target, w | other, sure, mask, certain)
            elif "XOR" in i.parts:
                self.set(target, w ^ other, known & ko, mask, certain)
            else:
                sure = (known & ko) | (known & ~w) | (ko & ~other)
                self.set(target, w & other & (known | ~known), sure, mask, certain)

    def do_FSETP(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        return False

    def do_PLOP3(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        first, second, *inputs = i.operands
        (a, ka), (b, kb), (c, kc) = (self.predicate(o) for o in inputs[:3])
        known = ka & kb & kc
        for target, text in ((first, inputs[3]), (second, inputs[4])):
            lut = int(text, 16)
            v = np.zeros(LANES, dtype=bool)
            for bit in range(8):
                if lut >> bit & 1:
                    v = v | ((a if bit & 4 else ~a) & (b if bit & 2 else ~b) & (c if bit & 1 else ~c))
            self.set(target, v, known, mask, certain)
        return True

    def do_SEL(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        (a, ka), (b, kb) = self.value(i.operands[1]), self.value(i.operands[2])
        p, kp = self.predicate(i.operands[3])
        same = ka & kb & (a == b)
        return self.put(i, np.where(p, a, b), (kp & np.where(p, ka, kb)) | same, mask, certain)

    def do_IMNMX(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        (a, ka), (b, kb) = self.value(i.operands[1]), self.value(i.operands[2])
        p, kp = self.predicate(i.operands[3])
        x, y = (a.astype(np.int64), b.astype(np.int64)) if "U32" in i.parts else (_signed(a), _signed(b))
        return self.put(i, np.where(p, np.minimum(x, y), np.maximum(x, y)), ka & kb & kp, mask, certain)

    def do_IABS(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        v, k = self.value(i.operands[1])
        return self.put(i, np.abs(_signed(v)), k, mask, certain)

    def do_PRMT(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        if len(i.parts) > 1:
            return False
        (a, ka), (s, ks), (b, kb) = (self.value(o) for o in i.operands[1:4])
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        v = np.zeros(LANES, dtype=np.uint32)
        for byte in range(4):
            n = s >> np.uint32(4 * byte) & np.uint32(0xF)
            taken = both >> (np.uint64(8) * (n & np.uint32(7)).astype(np.uint64)) & np.uint64(0xFF)
            sign = (n & np.uint32(8)) != 0
            taken = np.where(sign, np.where(taken & np.uint64(0x80), 0xFF, 0), taken)
            v = v | (taken.astype(np.uint32) << np.uint32(8 * byte))
        return self.put(i, v, ka & ks & kb, mask, certain)

    def do_I2F(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        if "RP" not in i.parts or "U64" in i.parts:
            return False
        v, k = self.value(i.operands[1])
        exact = v.astype(np.float64) if "U32" in i.parts else _signed(v).astype(np.float64)
        f = exact.astype(np.float32)
        f = np.where(f.astype(np.float64) < exact, np.nextafter(f, np.float32(np.inf)), f)
        return self.put(i, f.astype(np.float32).view(np.uint32), k, mask, certain)

    def do_MUFU(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        if "RCP" not in i.parts or "RCP64H" in i.parts:
            return False
        v, k = self.value(i.operands[1])
        with np.errstate(all="ignore"):
            f = (1 / v.view(np.float32)).astype(np.float32)
        return self.put(i, f.view(np.uint32), k, mask, certain)

    def do_F2I(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        if "U64" in i.parts or "U32" not in i.parts:
            return False
        v, k = self.value(i.operands[1])
        f = np.where(k, v, 0).astype(np.uint32).view(np.float32).astype(np.float64)
        return self.put(i, np.clip(np.trunc(np.nan_to_num(f)), 0, 2**32 - 1).astype(np.int64), k, mask, certain)

    def do_P2R(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        v, known = self.value(i.operands[2])
        bits = int(i.operands[3], 16)
        for n in range(7):
            if bits >> n & 1:
                p, k = self.predicate(f"P{n}")
                v = np.where(p, v | np.uint32(1 << n), v & np.uint32(0xFFFFFFFF ^ (1 << n)))
                known = known & k
        return self.put(i, v.astype(np.uint32), known, mask, certain)

    def do_R2P(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        v, k = self.value(i.operands[1])
        bits = int(i.operands[2], 16)
        for n in range(7):
            if bits >> n & 1:
                self.set(f"P{n}", v >> np.uint32(n) & np.uint32(1), k, mask, certain)
        return True

    def access(self, i: Instruction, where: str, write: bool, mask: Bits, certain: Bits) -> None:
        found = re.match(r"^\[(U?R\w+)(?:\.64|\.U32)?(?:\+(UR\w+))?(?:\+?(-?0x[0-9a-f]+))?\]$", where)
        assert found, i
        low, kl = self.value(found[1])
        high, kh = self.value(found[1], high=True)
        at = low.astype(np.int64) | high.astype(np.int64) << 32
        at = at + int(found[3] or "0", 16)
        if not (kl & kh & certain)[mask].all():
            raise RuntimeError(f"{i.address:#x}: an access at what is not known: {i}")
        width = next(
            (n for p, n in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)) if p in i.parts), 4
        )
        if mask.any():
            self.out.accesses.append(Access(i.address, write, width, tuple(int(a) for a in at[mask])))

    def do_LDG(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        self.access(i, i.operands[1], False, mask, certain)
        return False

    def do_STG(self, i: Instruction, mask: Bits, certain: Bits) -> bool:
        self.access(i, i.operands[0], True, mask, certain)
        return True
