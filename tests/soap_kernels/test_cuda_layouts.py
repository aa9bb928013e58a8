"""The lane layouts of ``mma``: the shim and the kernels have theirs from PTX's manual, Triton's compiler its own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest

import build as shim

pytest.importorskip("triton")
COMPILER = shutil.which("g++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None or shim.cuda_include() is None, reason="no g++ or no CUDA headers here"),
]
# Triton's compiler is asked in a process of its own, which it does not leave tidily.
ASK = """
import json
from triton._C.libtriton import gluon_ir, ir
from triton.experimental.gluon.language import DotOperandLayout, NVMMADistributedLayout
context = ir.context()
ir.load_dialects(context)
builder = gluon_ir.GluonOpBuilder(context)
c = NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
asked = []
for k in (16, 8):
    for layout, shape in ((DotOperandLayout(0, c, 2), [16, k]), (DotOperandLayout(1, c, 2), [k, 8]), (c, [16, 8])):
        found = builder.to_linear_layout(layout._to_ir(builder), shape)
        asked.append([found.reg_bases, found.lane_bases])
print("layouts", json.dumps(asked))
"""


def place(bases: Sequence[Sequence[int]], number: int) -> tuple[int, int]:
    """Row and column that a lane's or an element's number stands for: each of its bits adds its basis."""
    chosen = [basis for bit, basis in enumerate(bases) if number >> bit & 1]
    return sum(b[0] for b in chosen), sum(b[1] for b in chosen)


def table(registers: list[list[int]], lanes: list[list[int]]) -> list[int]:
    """Row and column of each element of each lane."""
    own = [basis for basis in registers if any(basis)]  # the others repeat what a smaller fragment lacks
    found = []
    for lane in range(32):
        for element in range(1 << len(own)):
            (r, c), (dr, dc) = place(lanes, lane), place(own, element)
            found += [r + dr, c + dc]
    return found


@pytest.fixture(scope="module")
def tables() -> list[list[int]]:
    """Of A, B and C, of m16n8k16 and then of m16n8k8."""
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=False)
    said = re.search(r"^layouts (.*)$", done.stdout, re.M)
    if said is None:
        pytest.skip("this Triton does not tell its layouts")
    return [table(registers, lanes) for registers, lanes in json.loads(said[1])]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert COMPILER is not None
    output = tmp_path_factory.mktemp("fragments") / "fragments"
    source = Path(shim.__file__).with_name("fragments.cu")
    command = [COMPILER, "-std=c++17", "-O1", "-w", f"-isystem{shim.cuda_include()}", "-x", "c++"]
    subprocess.run([*command, "-include", str(shim.SHIM), str(source), "-o", str(output)], check=True)
    return output


def wrong(program: Path, tables: list[list[int]]) -> list[int]:
    """How many elements of the products come out wrong: of m16n8k16, of m16n8k8."""
    numbers = " ".join(map(str, chain.from_iterable(tables)))
    done = subprocess.run([str(program)], input=numbers, capture_output=True, text=True, check=True)
    return [int(n) for n in done.stdout.split()]


def test_mma_multiplies_matrices_laid_out_as_triton_lays_them_out(program: Path, tables: list[list[int]]) -> None:
    assert wrong(program, tables) == [0, 0]


@pytest.mark.parametrize("operand", [0, 1, 2])
def test_another_layout_of_any_operand_is_noticed(operand: int, program: Path, tables: list[list[int]]) -> None:
    """Two lanes' shares exchanged."""
    changed = [list(t) for t in tables]
    for instruction in (0, 3):
        one = changed[instruction + operand]
        share = len(one) // 32
        one[:share], one[share : 2 * share] = one[share : 2 * share], one[:share]
    assert min(wrong(program, changed)) > 0
