"""Prints, as JSON, where Triton's compiler puts a matrix's elements among a warp's lanes and registers for `mma`.

And the PTX of a product, which shows how `ldmatrix` feeds it. A process of its own, since Triton's bindings complain of
what they leave behind at its end.
"""

from __future__ import annotations

import json

import triton
import triton.language as tl
from triton._C.libtriton import gluon_ir, ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon.language import DotOperandLayout, NVMMADistributedLayout

Element = tuple[int, ...]
ACCUMULATOR = NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
PAIR = 2  # 16-bit numbers in a register
OPERANDS = {
    "A16": (DotOperandLayout(0, ACCUMULATOR, PAIR), (16, 16), 8),
    "B16": (DotOperandLayout(1, ACCUMULATOR, PAIR), (16, 8), 4),
    "A8": (DotOperandLayout(0, ACCUMULATOR, PAIR), (16, 8), 4),
    "B8": (DotOperandLayout(1, ACCUMULATOR, PAIR), (8, 8), 2),
    "C": (ACCUMULATOR, (16, 8), 4),
}


def places(register_bases: list[Element], lane_bases: list[Element], elements: int) -> list[list[Element]]:
    """``[lane][element] -> (row, column)``: a linear layout adds up (exclusive or) the bases of an index's set bits."""

    def at(lane: int, element: int) -> Element:
        used = [b for i, b in enumerate(lane_bases) if lane >> i & 1]
        used += [b for i, b in enumerate(register_bases) if element >> i & 1]
        row = column = 0
        for base in used:
            row, column = row ^ base[0], column ^ base[1]
        return row, column

    return [[at(lane, element) for element in range(elements)] for lane in range(32)]


@triton.jit
def product(a, b, c):  # type: ignore[no-untyped-def]
    m = tl.arange(0, 16)
    k = tl.arange(0, 64)
    acc = tl.zeros((16, 16), tl.float32)
    for i in tl.range(0, 4, num_stages=1):
        v = tl.load(a + i * 64 + m[:, None] * 256 + k[None, :])
        w = tl.load(b + i * 1024 + k[:, None] * 16 + m[None, :])
        acc = tl.dot(v, w, acc)
    tl.store(c + m[:, None] * 16 + m[None, :], acc)


def ptx() -> str:
    signature = {"a": "*bf16", "b": "*bf16", "c": "*fp32"}
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = ASTSource(fn=product, signature=signature, constexprs={}, attrs=attributes)
    options = {"num_warps": 1, "enable_fp_fusion": True}
    return str(triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"])


def main() -> None:
    context = ir.context()
    ir.load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    found = {}
    for name, (layout, shape, elements) in OPERANDS.items():
        linear = builder.to_linear_layout(layout._to_ir(builder), list(shape))
        found[name] = places(linear.reg_bases, linear.lane_bases, elements)
    print(json.dumps({"places": found, "ptx": ptx()}))


if __name__ == "__main__":
    main()
