"""The report of what is known without a GPU: its tables come out, for frames in both dtypes."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import report


def test_launches_and_bytes_of_every_variant() -> None:
    rows = [line for line in report.launches_and_bytes(90) if line.startswith("|")][2:]
    variants = [tuple(cell.strip() for cell in row.split("|")[1:3]) for row in rows]
    names = ("plain", "folded, plain ops", "triton", "cuda")
    assert variants == [(name, frames) for frames in ("fp32", "bf16") for name in names]
    assert rows[3].split("|")[3:5] == [" 2 ", " 3 "]  # the CUDA kernels' launches


@pytest.mark.slow
@pytest.mark.gpu_proof
def test_the_whole_report_for_one_architecture() -> None:
    text = report.report([90], with_cuda=False)
    assert text.count("| sm_90 |") >= 12
    assert "| H100 | bf16 | sweep |" in text
