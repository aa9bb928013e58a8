"""SOAP folded into plain layers equals the paper's equations, here and in other runtimes."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor

from soap_kernels import SOAP
from soap_kernels.weights import PARTS

NORMALIZE = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
SUBSETS = [subset for size in range(4) for subset in itertools.combinations(PARTS, size)]


def pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(len(shape)))


def check(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("centred", [False, True], ids=["paper", "centred"])
@pytest.mark.parametrize("parts", SUBSETS, ids="+".join)
def test_folded_equals_the_equations(parts: tuple[str, ...], centred: bool) -> None:
    torch.manual_seed(1)
    plain = SOAP(frames=6, channels=2, tuple_sizes=(1, 3), parts=parts, backend="equations", centred=centred)
    x = torch.randn(2, 6, 2, 9, 7)
    check(plain.folded()(x), plain(x))
    uint8 = SOAP(parts=parts, backend="equations", normalize=NORMALIZE, centred=centred)
    check(uint8.folded()(pixels(3, 8, 3, 5, 11)), uint8(pixels(3, 8, 3, 5, 11)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_folded_keeps_the_dtypes_of_soap(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    soap = SOAP(frames=4, backend="equations").to(dtype)
    x = torch.randn(1, 4, 3, 6, 6).to(dtype)
    found = soap.folded()(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, soap(x).detach())  # rounded once, at the end, by both
    assert SOAP(frames=4, normalize=NORMALIZE, out_dtype=dtype).folded()(pixels(1, 4, 3, 6, 6)).dtype == dtype


def test_folded_refuses_what_soap_refuses_and_the_release() -> None:
    with pytest.raises(TypeError, match="expected uint8"):
        SOAP(normalize=NORMALIZE).folded()(torch.zeros(1, 8, 3, 4, 4))
    with pytest.raises(ValueError, match="variant 'release' doesn't fold"):
        SOAP(variant="release").folded()


def test_folded_is_a_copy_without_parameters_to_train() -> None:
    soap = SOAP(frames=4)
    folded, x = soap.folded(), torch.randn(1, 4, 3, 5, 5)
    before = folded(x)
    with torch.no_grad():
        for weight in soap.parameters():
            weight.add_(1)
    torch.testing.assert_close(folded(x), before, rtol=0, atol=0)
    assert not any(weight.requires_grad for weight in folded.parameters())
    other = SOAP(frames=4).folded()
    other.load_state_dict(folded.state_dict())
    torch.testing.assert_close(other(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("centred", [False, True], ids=["paper", "centred"])
def test_torch_export_and_jit_trace_take_it_for_any_batch_and_size(centred: bool) -> None:
    torch.manual_seed(3)
    soap = SOAP(normalize=NORMALIZE, backend="equations", centred=centred)
    any_size = {number: torch.export.Dim(name) for number, name in ((0, "batch"), (3, "height"), (4, "width"))}
    example = (pixels(2, 8, 3, 8, 10),)
    exported = torch.export.export(soap.folded(), example, dynamic_shapes=(any_size,)).module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch would have one leave torch.jit
        traced = torch.jit.trace(soap.folded(), example)
    for batch, height, width in ((1, 8, 10), (3, 12, 7)):
        x = pixels(batch, 8, 3, height, width)
        check(exported(x), soap(x))
        check(traced(x), soap(x))


@pytest.mark.slow
@pytest.mark.parametrize("centred", [False, True], ids=["paper", "centred"])
def test_onnxruntime_computes_the_same_for_any_batch(centred: bool) -> None:
    pytest.importorskip("onnxscript", reason="onnx and its like are not installed: pip install '.[export]'")
    onnxruntime = pytest.importorskip(
        "onnxruntime", reason="onnx and its like are not installed: pip install '.[export]'"
    )
    torch.manual_seed(4)
    soap = SOAP(normalize=NORMALIZE, backend="equations", centred=centred)
    batch = {0: torch.export.Dim("batch")}
    example = (pixels(2, 8, 3, 8, 10),)
    program = torch.onnx.export(soap.folded(), example, dynamo=True, dynamic_shapes=(batch,), verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for clips in (1, 5):
        x = pixels(clips, 8, 3, 8, 10)
        check(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), soap(x))
