"""The ops: schemas, checks, shapes (fake), autograd and autocast, once for all backends.

They exist in ``torch.ops.soap_kernels`` without any extension. Each takes the name of a backend, looks it up in
:mod:`soap_kernels.backends` and hands over checked arguments. ``soap`` is one node in the graph and saves for backward
nothing but x, the weights and what ``prepare`` left (a few KB): backward recomputes. Where PyTorch can't use such a
node (``torch.func``, forward mode, ``torch.jit.trace``) the functions compute in plain PyTorch, as the reference does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from soap_kernels import backends
from soap_kernels.backends import Backend, Fusion, Needs, Options, Priors
from soap_kernels.frames import as_float, as_output, check_tensor, compute_dtype, empty_frames, without_autocast
from soap_kernels.weights import PARTS, Weights, count_maps, count_weights, sum_at_rest

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

ELSEWHERE = 'torch.func (jacrev, hessian) and SOAP(backend="equations") compute in plain PyTorch and have every one'

_REFERENCE = backends.get("reference")

_library = torch.library.Library("soap_kernels", "DEF")
_library.define(
    "soap(Tensor x, Tensor[] weights, str[] parts, int[] tuple_sizes, str precision, float[]? mean, float[]? std,"
    " ScalarType? out_dtype, bool out_channels_last, float offset, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "soap_backward(Tensor grad, Tensor x, Tensor prepared, Tensor[] weights, str[] parts, int[] tuple_sizes,"
    " str precision, float[]? mean, float[]? std, bool needs_x, bool needs_weights, str backend)"
    " -> (Tensor, Tensor[])"
)
_library.define("window_sums(Tensor x, str backend) -> Tensor")
_library.define("window_sums_backward(Tensor grad, Tensor x, str backend) -> Tensor")
_library.define(
    "fuse_priors(Tensor x, Tensor? stencil, Tensor? gate, Tensor? weight, Tensor? bias, bool multiplicative,"
    " float offset, bool interleaved, str precision, str backend) -> Tensor"
)
_library.define(
    "fuse_priors_backward(Tensor grad, Tensor x, Tensor? stencil, Tensor? gate, Tensor? weight, Tensor? bias,"
    " bool multiplicative, float offset, bool interleaved, str precision, bool[] needs, str backend) -> Tensor[]"
)


def _shape(t: Tensor) -> str:
    return f"shape {tuple(t.shape)}"


def _check_dtype(op: str, x: Tensor, dtypes: Sequence[torch.dtype], more: str = "") -> None:
    if x.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: x has dtype {str(x.dtype).removeprefix('torch.')}, expected {names}{more}")


def _check_frames(op: str, x: Tensor, rank: int, layout: str) -> None:
    if x.dim() != rank:
        raise ValueError(f"{op}: x has {_shape(x)}, expected {layout}")
    _check_dtype(op, x, FLOATS)


def check_soap_dtype(op: str, x: Tensor, normalized: bool) -> None:
    """Raises TypeError unless x is uint8 where it is normalised on the way in, and floating where it is not."""
    if normalized:
        _check_dtype(op, x, (torch.uint8,), ", since it has mean and std (normalize=)")
    else:
        _check_dtype(op, x, FLOATS, ", or uint8 with mean and std (normalize=)")


def _check_weight(op: str, name: str, w: Tensor, shape: tuple[Any, ...], x: Tensor) -> None:
    if w.shape != shape:
        raise ValueError(f"{op}: {name} has {_shape(w)}, expected {shape} for x with {_shape(x)}")
    if w.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} has dtype {w.dtype}, expected a floating one")
    if w.device != x.device:
        raise ValueError(f"{op}: {name} is on {w.device}, x on {x.device}")


def _check_like(op: str, name: str, t: Tensor, x: Tensor) -> None:
    if t.shape != x.shape or t.device != x.device:
        raise ValueError(f"{op}: {name} has {_shape(t)} on {t.device}, expected x's {tuple(x.shape)} on {x.device}")


def _check_precision(op: str, precision: str) -> None:
    if precision not in backends.PRECISIONS:
        raise ValueError(f"{op}: precision is {precision!r}, expected one of {', '.join(backends.PRECISIONS)}")


def check_tuple_sizes(op: str, tuple_sizes: Sequence[int], frames: int) -> None:
    """Raises ValueError unless the sizes are distinct, ascending, at least 1 and below the number of frames."""
    if not tuple_sizes or list(tuple_sizes) != sorted(set(tuple_sizes)) or min(tuple_sizes) < 1:
        raise ValueError(f"{op}: tuple_sizes is {tuple(tuple_sizes)}, expected distinct ascending sizes of at least 1")
    if max(tuple_sizes) >= frames:
        raise ValueError(
            f"{op}: tuple_sizes is {tuple(tuple_sizes)}, expected sizes below the {frames} frames of a clip,"
            " since a tuple's difference needs the tuple after it"
        )


def _open_soap(x: Tensor, weights: Sequence[Tensor], *settings: Any) -> tuple[Options, Backend]:
    """Of the schema's arguments, checked, what a backend takes, and the backend."""
    parts, tuple_sizes, precision, mean, std, out_dtype, out_channels_last, offset, backend = settings
    if (mean is None) != (std is None):
        raise ValueError("soap: mean and std go together, one of them is None")
    if x.dim() != 5:
        raise ValueError(f"soap: x has {_shape(x)}, expected (B, T, C, H, W)")
    check_soap_dtype("soap", x, mean is not None)
    frames, channels = x.shape[1], x.shape[2]
    if mean is not None and std is not None and not len(mean) == len(std) == channels:
        raise ValueError(
            f"soap: mean has {len(mean)} and std {len(std)} entries, expected one per channel of x with {_shape(x)}"
        )
    if list(parts) != [p for p in PARTS if p in parts]:
        raise ValueError(f"soap: parts is {tuple(parts)}, expected some of {PARTS}, in this order")
    if out_dtype is not None and out_dtype not in FLOATS:
        raise TypeError(f"soap: out_dtype is {out_dtype}, expected a floating dtype")
    _check_precision("soap", precision)
    if "hmem" in parts:
        check_tuple_sizes("soap", tuple_sizes, frames)
    if len(weights) != count_weights(parts, len(tuple_sizes)):
        raise ValueError(
            f"soap: weights holds {len(weights)} tensors, expected {count_weights(parts, len(tuple_sizes))}"
            f" for parts {tuple(parts)} and {len(tuple_sizes)} tuple sizes"
        )
    w = Weights.unflatten(weights, parts, len(tuple_sizes))
    if w.three_dem:
        _check_weight("soap", "three_dem.conv.weight", w.three_dem.conv, (1, 1, 3, 3, 3), x)
    if w.cwem:
        hidden = w.cwem.expand.shape[0]
        _check_weight("soap", "cwem.expand.weight", w.cwem.expand, (hidden, channels, 1, 1), x)
        _check_weight("soap", "cwem.temporal.weight", w.cwem.temporal, (hidden, hidden, 3), x)
        _check_weight("soap", "cwem.temporal.bias", w.cwem.temporal_bias, (hidden,), x)
        _check_weight("soap", "cwem.squeeze.weight", w.cwem.squeeze, (channels, hidden, 1, 1), x)
    if w.hmem:
        for k, o in enumerate(tuple_sizes):
            planes = o * channels
            _check_weight("soap", f"hmem.motion.{k}.weight", w.hmem.motion[k], (planes, planes, 3, 3), x)
            _check_weight("soap", f"hmem.motion.{k}.bias", w.hmem.motion_bias[k], (planes,), x)
            _check_weight("soap", f"hmem.project.{k}.weight", w.hmem.project[k], (channels, planes, 1, 1), x)
            _check_weight("soap", f"hmem.project.{k}.bias", w.hmem.project_bias[k], (channels,), x)
        maps = count_maps(frames, tuple_sizes)
        _check_weight("soap", "hmem.restore.weight", w.hmem.restore, (frames, maps), x)
        _check_weight("soap", "hmem.restore.bias", w.hmem.restore_bias, (frames,), x)
    out_dtype = out_dtype or (torch.float32 if x.dtype == torch.uint8 else x.dtype)
    mean, std = (None if numbers is None else tuple(numbers) for numbers in (mean, std))
    options = Options(tuple(parts), tuple(tuple_sizes), precision, mean, std, out_dtype, out_channels_last, offset)
    chosen = backends.choose(backend, x, out_dtype, *(w.dtype for w in weights))
    return options, chosen if parts else _REFERENCE


def _at_work(x: Tensor, precision: str = "default") -> AbstractContextManager[None]:
    """While a backend works: autocast off, x's device current, cuDNN's fp32 convolutions no TF32 unless "fast"."""
    return _at_work_on_cuda(x, precision) if x.is_cuda else without_autocast(x)


@contextmanager
def _at_work_on_cuda(x: Tensor, precision: str) -> Iterator[None]:
    cudnn = torch.backends.cudnn
    exact = cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=True, allow_tf32=precision == "fast")
    with without_autocast(x), exact, torch.cuda.device(x.device):
        yield


def _apart(t: Tensor, source: Tensor) -> Tensor:
    """``t``, but no op may return the memory of its own input."""
    return t.clone() if t.data_ptr() == source.data_ptr() else t


def _gradient(found: Tensor | None, of: Tensor, grad: Tensor) -> Tensor:
    """A backend's gradient in the dtype and shape of what it is ``of``; empty(0) for None, which a schema has not."""
    if found is None:
        return of.new_empty(0)
    if found.dtype != of.dtype or not found.is_contiguous():
        found = found.to(of.dtype).contiguous()
    return _apart(found, grad)


_implements = partial(torch.library.impl, types="CompositeExplicitAutograd", lib=_library)
_has_shape = partial(torch.library.register_fake, lib=_library)


@_implements("soap_kernels::soap")
def _soap(x: Tensor, weights: list[Tensor], *settings: Any) -> tuple[Tensor, Tensor]:
    options, backend = _open_soap(x, weights, *settings)
    if x.numel() == 0:
        return _soap_fake(x, weights, *settings)
    with _at_work(x, options.precision):
        y, prepared = backend.soap_forward(x, [w.contiguous() for w in weights], options)
    return _apart(y, x), prepared


@_has_shape("soap_kernels::soap")
def _soap_fake(x: Tensor, weights: list[Tensor], *settings: Any) -> tuple[Tensor, Tensor]:
    options, backend = _open_soap(x, weights, *settings)
    y = empty_frames(x, options.out_dtype, options.out_channels_last)
    return y, x.new_empty(backend.prepared_numel(x, options), dtype=torch.float32)


@_implements("soap_kernels::soap_backward")
def _soap_backward(
    grad: Tensor, x: Tensor, prepared: Tensor, weights: list[Tensor], *settings: Any
) -> tuple[Tensor, list[Tensor]]:
    *named, needs_x, needs_weights, name = settings
    needs = Needs(needs_x, needs_weights)
    _check_like("soap_backward", "grad", grad, x)
    options, backend = _open_soap(x, weights, *(*named, grad.dtype, False, 0.0, name))
    # A hook on saved tensors may have put something else in its place.
    numel = backend.prepared_numel(x, options)
    if prepared.shape != (numel,) or prepared.dtype != torch.float32 or prepared.device != x.device:
        raise ValueError(
            f"soap_backward: prepared has {_shape(prepared)} and dtype {prepared.dtype} on {prepared.device}, expected"
            f" the {numel} numbers in float32 on {x.device} that soap left"
        )
    if x.numel() == 0:
        dx, dweights = _soap_backward_fake(grad, x, prepared, weights, *settings)
        return dx, [w.zero_() for w in dweights]
    with _at_work(x, options.precision):
        dense = [w.contiguous() for w in weights]
        found, gradients = backend.soap_backward(grad, x, prepared.contiguous(), dense, options, needs)
    dweights = [_gradient(g, w, grad) for g, w in zip(gradients or (), weights, strict=True)] if needs_weights else []
    return _gradient(found if needs_x else None, x, grad), dweights


@_has_shape("soap_kernels::soap_backward")
def _soap_backward_fake(
    grad: Tensor, x: Tensor, prepared: Tensor, weights: list[Tensor], *settings: Any
) -> tuple[Tensor, list[Tensor]]:
    *_, needs_x, needs_weights, _ = settings
    return x.new_empty(x.shape if needs_x else 0), [w.new_empty(w.shape) for w in weights] if needs_weights else []


def _soap_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weights, *settings, _, _, _, ctx.backend = inputs
    ctx.save_for_backward(x, output[1], *weights)
    ctx.mark_non_differentiable(output[1])
    ctx.settings = settings


def _soap_autograd(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    x, prepared, *weights = ctx.saved_tensors
    needs_x, needs_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1])
    dx, dweights = torch.ops.soap_kernels.soap_backward(
        grad, x, prepared, weights, *ctx.settings, needs_x, needs_weights, ctx.backend
    )
    # An empty list is one of tensors to autograd, and an empty list then is its gradient.
    rest: list[Any] = [[] if setting == [] else None for setting in ctx.settings]
    return dx if needs_x else None, dweights if needs_weights else [None] * len(weights), *rest, *[None] * 4


def _open_window_sums(x: Tensor, backend: str) -> Backend:
    _check_frames("window_sums", x, 4, "(N, C, H, W)")
    return backends.choose(backend, x)


@_implements("soap_kernels::window_sums")
def _window_sums(x: Tensor, backend: str) -> Tensor:
    chosen = _open_window_sums(x, backend)
    if x.numel() == 0:
        return _window_sums_fake(x, backend).zero_()
    with _at_work(x):
        return chosen.window_sums(x)


@_has_shape("soap_kernels::window_sums")
def _window_sums_fake(x: Tensor, backend: str) -> Tensor:
    _open_window_sums(x, backend)
    return x.new_empty((*x.shape[:2], 3, 3), dtype=compute_dtype(x))


@_implements("soap_kernels::window_sums_backward")
def _window_sums_backward(grad: Tensor, x: Tensor, backend: str) -> Tensor:
    chosen = _open_window_sums(x, backend)
    if grad.shape != (*x.shape[:2], 3, 3) or grad.device != x.device:
        expected = f"{(*x.shape[:2], 3, 3)} on {x.device}"
        raise ValueError(f"window_sums_backward: grad has {_shape(grad)} on {grad.device}, expected {expected}")
    if x.numel() == 0:
        return x.new_empty(x.shape)
    with _at_work(x):
        found = chosen.window_sums_backward(grad.to(compute_dtype(x)).contiguous(), x)
    return _gradient(found, x, grad)


@_has_shape("soap_kernels::window_sums_backward")
def _window_sums_backward_fake(grad: Tensor, x: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _window_sums_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


def _window_sums_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return torch.ops.soap_kernels.window_sums_backward(grad, x, ctx.backend), None


def _open_fusion(x: Tensor, *settings: Any) -> tuple[Priors, Fusion, Backend]:
    """Of the schema's arguments, checked, what a backend takes, and the backend."""
    priors, fusion = Priors(*settings[:4]), Fusion(*settings[4:8])
    _check_frames("fuse_priors", x, 5, "(B, T, C, H, W)")
    _check_precision("fuse_priors", fusion.precision)
    b, t, c = x.shape[:3]
    if priors.bias is not None and priors.weight is None:
        raise ValueError("fuse_priors: bias is given without weight")
    shapes = ((1, 1, 3, 3, 3), (b, t, c), (t * c, t * c, 3, 3), (t * c,))
    for name, prior, shape in zip(Priors._fields, priors, shapes, strict=True):
        if prior is not None:
            _check_weight("fuse_priors", name, prior, shape, x)
    return priors, fusion, backends.choose(settings[8], x, *(prior.dtype for prior in priors if prior is not None))


@_implements("soap_kernels::fuse_priors")
def _fuse_priors(x: Tensor, *settings: Any) -> Tensor:
    priors, fusion, backend = _open_fusion(x, *settings)
    if x.numel() == 0:
        return x.new_empty(x.shape)
    with _at_work(x, fusion.precision):
        return _apart(backend.fuse_priors(x, priors.contiguous(), fusion).contiguous(), x)


@_has_shape("soap_kernels::fuse_priors")
def _fuse_priors_fake(x: Tensor, *settings: Any) -> Tensor:
    _open_fusion(x, *settings)
    return x.new_empty(x.shape)


@_implements("soap_kernels::fuse_priors_backward")
def _fuse_priors_backward(grad: Tensor, x: Tensor, *settings: Any) -> list[Tensor]:
    *given, needs, name = settings
    priors, fusion, backend = _open_fusion(x, *given, name)
    _check_like("fuse_priors_backward", "grad", grad, x)
    if x.numel() == 0:
        return [g.zero_() for g in _fuse_priors_backward_fake(grad, x, *settings)]
    with _at_work(x, fusion.precision):
        found = backend.fuse_priors_backward(grad, x, priors.contiguous(), fusion, needs)
    return [
        _gradient(g if need else None, x if of is None else of, grad)
        for g, of, need in zip(found, (x, *priors), needs, strict=True)
    ]


@_has_shape("soap_kernels::fuse_priors_backward")
def _fuse_priors_backward_fake(grad: Tensor, x: Tensor, *settings: Any) -> list[Tensor]:
    return [
        x.new_empty(0) if of is None else of.new_empty(of.shape if need else 0)
        for of, need in zip((x, *settings[:4]), settings[-2], strict=True)
    ]


def _fuse_priors_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings, ctx.backend = inputs[5:9], inputs[9]


def _fuse_priors_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:5])
    found = torch.ops.soap_kernels.fuse_priors_backward(grad, *ctx.saved_tensors, *ctx.settings, needs, ctx.backend)
    return *(g if need else None for g, need in zip(found, needs, strict=True)), *[None] * 5


def _derive(op: str, setup: Callable[..., None], backward: Callable[..., tuple[Any, ...]]) -> None:
    """``backward`` is the op's first derivative; a second is refused."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{op} has no second derivative: its backward recomputes what it needs and is itself not differentiable;"
            f" {ELSEWHERE}"
        )

    torch.library.register_autograd(f"soap_kernels::{op}", backward, setup_context=setup, lib=_library)
    torch.library.register_autograd(f"soap_kernels::{op}_backward", refuse, lib=_library)


_derive("soap", _soap_setup, _soap_autograd)
_derive("window_sums", _window_sums_setup, _window_sums_autograd)
_derive("fuse_priors", _fuse_priors_setup, _fuse_priors_autograd)


def _refuse_batch(*_: Any) -> None:
    raise RuntimeError(f"SOAP has no derivatives by the batch (vectorize=, is_grads_batched=); {ELSEWHERE}")


for _op in ("soap_backward", "fuse_priors_backward"):  # PyTorch batches the third, whose result is no list, by itself
    torch.library.impl(f"soap_kernels::{_op}", "Batched", _refuse_batch, lib=_library)


def _in_plain_pytorch(*tensors: Tensor | None) -> bool:
    """Whether an op with a backward alone won't do.

    Transforms of ``torch.func`` refuse it, ``torch.jit.trace`` can't write it down, and forward mode gives it a
    derivative of zero, without a word.
    """
    check_tensor(tensors[0])
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():
        return False
    return torch.jit.is_tracing() or any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def soap(
    x: Tensor,
    weights: Sequence[Tensor],
    parts: Sequence[str] = PARTS,
    tuple_sizes: Sequence[int] = (1, 2, 3),
    precision: str = "default",
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    out_dtype: torch.dtype | None = None,
    out_channels_last: bool = False,
    backend: str = "auto",
    centred: bool = False,
) -> Tensor:
    """``x`` plus SOAP's priors (Eqn 15), as one op; x itself where there is nothing to do.

    Args:
        x: frames ``(B, T, C, H, W)``: fp32, fp16, bf16 or fp64, any strides; or uint8 with ``normalize``.
        weights: the tensors of the parts that are on, in state_dict order (see ``Weights``), any floating dtype.
        parts: which of ``("3dem", "cwem", "hmem")``, in this order.
        tuple_sizes: O, ascending.
        precision: ``"default"``; ``"strict"``, an ordinary fp32 convolution's error; ``"fast"``, GPUs may use TF32.
        normalize: per-channel (mean, std) in units of 0..1, for uint8 frames.
        out_dtype: of y; x's by default, fp32 for uint8 frames.
        out_channels_last: y such that ``y.flatten(0, 1)`` is channels_last; else contiguous.
        backend: ``"auto"``, ``"cpp"``, ``"cuda"``, ``"triton"`` or ``"reference"``.
        centred: each prior less one half, its value at rest.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, device or dtype; the text names it.
        RuntimeError: the backend asked for is absent; the text says why.
    """
    if not (parts or weights or normalize or out_dtype or out_channels_last):
        return x
    mean, std = (None, None) if normalize is None else (list(normalize[0]), list(normalize[1]))
    offset = -sum_at_rest(parts) if centred else 0.0
    settings = (list(parts), list(tuple_sizes), precision, mean, std, out_dtype, out_channels_last, offset, backend)
    if _in_plain_pytorch(x, *weights):
        options, _ = _open_soap(x, weights, *settings)
        if 0 in x.shape[-2:]:  # which no convolution of PyTorch takes
            return as_output(as_float(x, options.mean, options.std), options.out_dtype, out_channels_last)
        with _at_work(x, precision):
            return _REFERENCE.soap_forward(x, weights, options)[0]
    y, _ = torch.ops.soap_kernels.soap(x, list(weights), *settings)
    return y


def window_sums(x: Tensor, backend: str = "auto") -> Tensor:
    """What each tap of a zero-padded 3x3 conv sees of a plane, summed: all that a conv before a global average needs.

    Args:
        x: ``(N, C, H, W)``.
        backend: as in :func:`soap`.

    Returns:
        ``(N, C, 3, 3)``, fp32 (fp64 for fp64): the total, less a border row or column, plus a corner.
    """
    if _in_plain_pytorch(x):
        _open_window_sums(x, backend)
        return _REFERENCE.window_sums(x)
    return torch.ops.soap_kernels.window_sums(x, backend)


def fuse_priors(
    x: Tensor,
    stencil: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    multiplicative: bool = False,
    offset: float | None = None,
    interleaved: bool = False,
    precision: str = "default",
    backend: str = "auto",
) -> Tensor:
    """``x + (offset + s(stencil) + gate + s(conv))``, or x times the same sum; a prior not given is left out.

    Args:
        x: ``(B, T, C, H, W)``.
        stencil: ``(1, 1, 3, 3, 3)``, on the channel means (3DEM).
        gate: ``(B, T, C)``, after its sigmoid.
        weight: ``(TC, TC, 3, 3)`` between frame-major planes ``t * C + c``, zero padding 1.
        bias: ``(TC,)``.
        multiplicative: the second form.
        offset: what the sum starts from: by default 1 where it multiplies x, else 0.
        interleaved: slot t of the stencil averages planes t, T + t, 2T + t, ... of the (frame, channel) list, as the
            authors' release does, instead of frame t's channels.
        precision: as in :func:`soap`.
        backend: as in :func:`soap`.

    Returns:
        Like x, contiguous.
    """
    offset = float(multiplicative) if offset is None else offset
    settings = (stencil, gate, weight, bias, multiplicative, offset, interleaved, precision, backend)
    if _in_plain_pytorch(x, stencil, gate, weight, bias):
        priors, fusion, _ = _open_fusion(x, *settings)
        if 0 in x.shape[-2:]:
            return x.contiguous()
        with _at_work(x, precision):
            return _REFERENCE.fuse_priors(x, priors, fusion)
    return torch.ops.soap_kernels.fuse_priors(x, *settings)
