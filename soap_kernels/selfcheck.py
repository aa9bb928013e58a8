"""`python -m soap_kernels.selfcheck`: every backend present on this machine against the float64 equations, in seconds.

Prints one line for each backend, dtype and precision with the largest error of y and the largest relative error of any
gradient, beside what is allowed, and the time of one forward and backward (on a clip so small that most of it is the
call's own cost); and for a backend that is absent why it is. Ends with 1 if a backend is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from soap_kernels import backends, equations, op
from soap_kernels.backends import cpp
from soap_kernels.modules import SOAP
from soap_kernels.weights import PARTS, Weights

# Allowed: |y - oracle| on unit-scale frames, and the relative (Frobenius) error of a gradient. fp16 and bf16: the
# rounding of y. TF32 products ("fast" on a GPU) keep 10 bits.
ALLOWED = {torch.float32: (2e-5, 1e-4), torch.float16: (4e-3, 2e-3), torch.bfloat16: (3.2e-2, 1.6e-2)}
ALLOWED_FAST = (5e-3, 2e-2)
SHAPE = (2, 8, 3, 30, 37)


@dataclass(frozen=True)
class Check:
    backend: str
    device: str
    dtype: torch.dtype
    precision: str
    output_error: float
    gradient_error: float
    allowed: tuple[float, float]
    milliseconds: float

    @property
    def passed(self) -> bool:
        return self.output_error <= self.allowed[0] and self.gradient_error <= self.allowed[1]


def check(backend: str, device: str, dtype: torch.dtype, precision: str) -> Check:
    """One backend's forward and backward, all parts on, gradients for x and for every weight, against the oracle.

    The worse of both forms, centred and not.
    """
    torch.manual_seed(0)
    module = SOAP()
    x = torch.randn(SHAPE).to(dtype)
    grad = torch.randn(SHAPE).to(dtype)

    doubles = [v.detach().double().requires_grad_() for v in (x, *module.weights().flatten())]
    weights = Weights.unflatten(doubles[1:], PARTS, len(module.tuple_sizes))

    leaves = [v.detach().to(device).requires_grad_() for v in (x, *module.weights().flatten())]
    grad = grad.to(device)
    output_errors, relative = [], []
    for centred in (True, False):  # the first call builds and loads, the second is timed
        expected = equations.soap(doubles[0], weights, module.tuple_sizes, centred)
        gradients = torch.autograd.grad(expected, doubles, grad.cpu().double())
        start = time.perf_counter()
        y = op.soap(leaves[0], leaves[1:], PARTS, module.tuple_sizes, precision, backend=backend, centred=centred)
        found = torch.autograd.grad(y, leaves, grad)
        output_errors.append(float((y.detach().cpu().double() - expected.detach()).abs().max()))  # waits for a GPU
        spent = 1e3 * (time.perf_counter() - start)
        relative += [float((f.cpu().double() - e).norm() / e.norm()) for f, e in zip(found, gradients, strict=True)]
    allowed = ALLOWED_FAST if precision == "fast" and dtype == torch.float32 and device != "cpu" else ALLOWED[dtype]
    return Check(backend, device, dtype, precision, max(output_errors), max(relative), allowed, spent)


def checks(device: str, names: Sequence[str]) -> Iterator[Check]:
    """All checks of the named backends that are present for ``device``."""
    for name in names:
        if backends.get(name).why_absent(torch.device(device)) is not None:
            continue
        for dtype in ALLOWED:
            for precision in backends.PRECISIONS if dtype == torch.float32 else ("default",):
                yield check(name, device, dtype, precision)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m soap_kernels.selfcheck", description=__doc__)
    parser.add_argument("--device", help="cpu or cuda; by default both where there is a GPU")
    chosen = parser.parse_args(arguments)
    devices = [chosen.device] if chosen.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    line = "{:<10} {:<6} {:<9} {:<8} {:>9} {:>9} {:>9} {:>9} {:>9}  {}"
    print(line.format("backend", "device", "dtype", "prec.", "y error", "allowed", "gradient", "allowed", "ms", ""))
    wrong = 0
    for device in devices:
        for c in checks(device, backends.names()[1:]):
            wrong += not c.passed
            name = str(c.dtype).removeprefix("torch.")
            numbers = (c.output_error, c.allowed[0], c.gradient_error, c.allowed[1])
            cells = [f"{n:.1e}" for n in numbers]
            verdict = "ok" if c.passed else "WRONG"
            print(line.format(c.backend, c.device, name, c.precision, *cells, f"{c.milliseconds:.1f}", verdict))
    for device in devices:
        for name, why in backends.status(device).items():
            if why is not None:
                print(f"{name} is absent on {device}: {why}")
    if backends.status("cpu")["cpp"] is None:
        info = cpp.build_info()
        print(
            f"cpp uses {cpp.isa()} of {', '.join(cpp.isas())}; built by {info['compiler']} with torch"
            f" {info['torch_built_with']}, for torch {info['torch_target']} and later; torch here {torch.__version__}"
        )
    print("all backends agree with the equations" if not wrong else f"{wrong} checks are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
