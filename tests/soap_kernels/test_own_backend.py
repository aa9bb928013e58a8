"""docs/backends.md: its example runs, is right, and is a backend like any other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import soap_kernels
from soap_kernels import SOAP, backends, selfcheck
from soap_kernels.backends import Priors

PAGE = Path(__file__).resolve().parents[2] / "docs" / "backends.md"


@pytest.fixture(scope="module")
def own() -> Any:
    """The name of the page's backend, registered by the page's own code."""
    example, _ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(example, str(PAGE), "exec"), {})
    yield "clip-by-clip"
    backends.unregister("clip-by-clip")


def test_the_examples_outputs_and_gradients_equal_the_equations(own: str) -> None:
    checks = list(selfcheck.checks("cpu", [own]))
    assert len(checks) == 5
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("given", ["sgwb", "s", "g", "w", ""])
def test_the_examples_other_ops_equal_the_reference(own: str, given: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 5, 6, requires_grad=True)
    shapes = Priors((1, 1, 3, 3, 3), (2, 4, 3), (12, 12, 3, 3), (12,))
    priors = [torch.rand(s, requires_grad=True) if k in given else None for k, s in zip("sgwb", shapes, strict=True)]
    leaves = [x, *(p for p in priors if p is not None)]
    found = []
    for name in (own, "reference"):
        y = soap_kernels.fuse_priors(x, *priors, multiplicative=True, backend=name)
        sums = soap_kernels.window_sums(x.flatten(0, 1), name)
        found.append([y, sums, *torch.autograd.grad((y * y).sum() + (sums * sums).sum(), leaves)])
    torch.testing.assert_close(*found)


def test_it_is_one_node_of_a_compiled_graph_for_any_batch(own: str) -> None:
    module = SOAP(backend=own)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        x = torch.randn(batch, 8, 3, 6, 5)
        torch.testing.assert_close(compiled(x), SOAP.forward(module, x))


def test_it_is_asked_for_by_its_name_alone(own: str) -> None:
    assert own in backends.names()
    assert backends.choose("auto", torch.zeros(1)).name != own
    with pytest.raises(ValueError, match="there is a backend 'clip-by-clip' already"):
        backends.register(backends.get(own))
    with pytest.raises(ValueError, match="there is a backend 'reference' already"):
        backends.register(backends.get("reference"))


class Spy:
    """Writes down what it is handed, and answers as the reference does."""

    name = "spy"

    def __init__(self) -> None:
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, method: str) -> Any:
        def call(*args: Any) -> Any:
            self.seen.append((method, args))
            return getattr(backends.get("reference"), method)(*args)

        return call


@pytest.fixture
def spy() -> Iterator[Spy]:
    spy = Spy()
    backends.register(spy)
    yield spy
    backends.unregister("spy")


def test_a_backend_meets_no_special_case(spy: Spy) -> None:
    """No empty frames, no part, no float64, no weight or prior with gaps, no call for gradients that nobody needs."""
    module = SOAP(4, 3, (1, 2), backend="spy")
    module.hmem.restore.weight.data = module.hmem.restore.weight.data.T.contiguous().T
    weights = [w.detach().requires_grad_() for w in module.weights().flatten()]
    x = torch.randn(2, 4, 3, 5, 6, requires_grad=True)
    gate = torch.rand(4, 3, 2).permute(2, 0, 1).requires_grad_()
    soap_kernels.soap(x, [], (), out_dtype=torch.bfloat16, backend="spy").sum().backward()
    for frames in (x, x[:0], x[..., :0], x.double()):
        soap_kernels.window_sums(frames.flatten(0, 1), "spy").sum().backward()
        soap_kernels.fuse_priors(frames, gate=gate[: len(frames)], backend="spy").sum().backward()
        soap_kernels.soap(frames, weights, tuple_sizes=(1, 2), backend="spy").sum().backward()
        soap_kernels.soap(frames, weights, tuple_sizes=(1, 2), out_dtype=torch.float64, backend="spy").sum().backward()
    worked = [(method, args) for method, args in spy.seen if method not in ("why_absent", "prepared_numel")]
    assert len(worked) == 6  # once each, of the seventeen calls above forward and backward
    for method, args in worked:
        flat, _ = torch.utils._pytree.tree_flatten(args)
        tensors = [v for v in flat if isinstance(v, torch.Tensor)]
        assert all(t.dtype != torch.float64 for t in tensors)
        of_frames = 2 if method.endswith("backward") else 1
        assert all(t.numel() for t in tensors[:of_frames])
        assert all(t.is_contiguous() for t in tensors[of_frames:]), method
