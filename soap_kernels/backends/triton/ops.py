"""From the ops' arguments to launches: layouts, buffers and what goes into each kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from soap_kernels.backends import Fusion, Options, Priors, reference
from soap_kernels.backends.triton import wide as planes
from soap_kernels.backends.triton.finish import finish, finish_priors
from soap_kernels.backends.triton.fuse import fuse, fuse_dx
from soap_kernels.backends.triton.plan import (
    PROGRAMS,
    Cover,
    Layout,
    Numbers,
    Tile,
    aligned,
    chunks,
    cover,
    launch,
    processors,
    tile,
    wide,
)
from soap_kernels.backends.triton.prepare import prepare
from soap_kernels.backends.triton.reduce import reduce
from soap_kernels.backends.triton.sweep import sweep, weigh
from soap_kernels.backends.triton.window_sums import window_sums as window_sums_kernel
from soap_kernels.backends.triton.window_sums import window_sums_backward as window_sums_backward_kernel
from soap_kernels.fold import unfold_three_dem
from soap_kernels.frames import as_float, as_output
from soap_kernels.weights import Weights

PLANE_BLOCK = 2048  # pixels that a program of prepare adds up at once
REDUCE_ROWS, REDUCE_COLUMNS = 32, 64
COPY_BLOCK = 1024


@cache
def _slots(layout: Layout, numbers: Numbers, clips: int, height: int, width: int) -> tuple[tuple[int, int], ...]:
    """Where in ``prepared`` lie the folded weights, their bias, CWEM's taps and the planes' sums: (first, length)."""
    size = torch.finfo(numbers.stored()).bits // 8
    folded = layout.conv * (2 if numbers.split else 1) * 9 * layout.rows * layout.columns * size // 4
    gate = layout.hidden > 0
    channels = layout.channels
    lengths = (
        folded,
        layout.conv * layout.rows,
        gate * (3 * channels + 1) * channels,
        gate * clips * layout.frames * channels * chunks(height, width),
    )
    slots = []
    first = 0
    for length in lengths:
        slots.append((first, length))
        first += -(-length // 4) * 4
    return (*slots, (first, 0))


@dataclass(frozen=True)
class Prepared:
    """The pieces of ``prepared``; one that no part needs is empty."""

    folded: Tensor
    bias: Tensor
    cwem: Tensor
    means: Tensor

    @classmethod
    def of(cls, prepared: Tensor, layout: Layout, numbers: Numbers, x: Tensor) -> Prepared:
        slots = _slots(layout, numbers, x.shape[0], x.shape[3], x.shape[4])[:4]
        folded, *rest = (prepared[first : first + length] for first, length in slots)
        return cls(folded.view(numbers.stored()), *rest)


def _layout(x: Tensor, options: Options, hidden: int) -> Layout:
    return Layout(
        frames=x.shape[1],
        channels=x.shape[2],
        sizes=options.tuple_sizes if "hmem" in options.parts else (),
        hidden=hidden if "cwem" in options.parts else 0,
        direct=False,
        stencil="3dem" in options.parts,
        normalize=options.mean is not None,
    )


def _numbers(x: Tensor, options: Options) -> Numbers:
    return Numbers.choose(x.dtype, options.out_dtype, options.precision)


def prepared_numel(x: Tensor, options: Options) -> int:
    layout = _layout(x, options, 1)
    if not layout.fits or not options.parts:
        return 0
    return _slots(layout, _numbers(x, options), x.shape[0], x.shape[3], x.shape[4])[-1][0]


def _normalization(options: Options) -> dict[str, tuple[float, ...] | None]:
    """x * scale + shift, from uint8 to normalised frames."""
    if options.mean is None or options.std is None:
        return {"scale": None, "shift": None}
    pairs = list(zip(options.mean, options.std, strict=True))
    return {"scale": tuple(1 / (255 * s) for _, s in pairs), "shift": tuple(-m / s for m, s in pairs)}


def _strides(t: Tensor, name: str) -> dict[str, int]:
    return {name + axis: stride for axis, stride in zip("BTCHW", t.stride(), strict=True)}


def _contiguous(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t.contiguous() for t in tensors)


def _cover(kernel: str, numbers: Numbers, layout: Layout, x: Tensor) -> tuple[Tile, Cover]:
    chosen = tile(kernel, numbers, layout, processors(x)[1])
    return chosen, cover(x.shape[3], x.shape[4], chosen, aligned(x), x.element_size(), kernel != "weigh")


def _prepare(
    x: Tensor, layout: Layout, numbers: Numbers, pieces: Prepared, weights: dict[str, Any], **options: Any
) -> None:
    height, width = x.shape[3:]
    share = chunks(height, width)
    planes = x.shape[0] * x.shape[1] * x.shape[2] if layout.hidden else 0
    absent = dict.fromkeys(
        [
            "motion",
            "motion_bias",
            "project",
            "project_bias",
            "restore",
            "restore_bias",
            "stencil",
            "weight",
            "bias",
            "expand",
            "temporal",
            "temporal_bias",
            "squeeze",
            "scale",
            "shift",
        ]
    )
    launch(
        prepare, (10 + planes * share,), x,
        **{**absent, **weights}, folded=pieces.folded, folded_bias=pieces.bias, cwem=pieces.cwem, means=pieces.means,
        **_strides(x, "s"), H=height, W=width, **layout.grid(), **layout.folds(), CONV=layout.conv,
        DIRECT=layout.direct, STENCIL_GROUP=layout.stencil_group, INTERLEAVED=options.get("interleaved", False),
        NORMALIZE=layout.normalize, ONE=layout.one, SPLIT=numbers.split > 0, CHUNKS=share,
        FLAT=x.stride(3) == width * x.stride(4), WIDE=wide(height, width, x.stride()), BLOCK=PLANE_BLOCK, num_warps=8,
    )  # fmt: skip


def _fuse(
    x: Tensor, layout: Layout, numbers: Numbers, pieces: Prepared, y: Tensor, gate: Tensor | None,
    scale: tuple[float, ...] | None = None, shift: tuple[float, ...] | None = None, multiplicative: bool = False,
    offset: float = 1.0, channels_last: bool = False,
) -> None:  # fmt: skip
    height, width = x.shape[3:]
    chosen, over = _cover("fuse", numbers, layout, x)
    launch(
        fuse, (x.shape[0] * over.tiles,), x, pieces.folded, pieces.bias, gate, pieces.means, pieces.cwem, scale, shift,
        y, *x.stride(), height, width, over.tiles_w, over.tiles, float(offset), **layout.grid(), CONV=layout.conv,
        HMEM=layout.hmem, GATE=2 if gate is not None else 1 if layout.hidden else 0,
        STENCIL_GROUP=layout.stencil_group, MULTIPLICATIVE=multiplicative, NORMALIZE=layout.normalize, ONE=layout.one,
        CHUNKS=chunks(height, width), CHANNELS_LAST=channels_last, WIDE=wide(height, width, x.stride()),
        **numbers.constants(), **over.constants(), STAGES=chosen.stages, **chosen.options(),
    )  # fmt: skip


def _pitch(width: int) -> tuple[int, int]:
    """Columns before a row of dz and from one row to the next: at least one on either side, rows aligned as x's are."""
    pad = 8 if width % 16 == 0 else 1
    return pad, width + 2 * pad


@dataclass(frozen=True)
class Swept:
    """What sweep and reduce leave: gradients of what is folded, and on the way to dx dz and its direct term."""

    folded: Tensor | None
    bias: Tensor | None
    gate: Tensor | None  # (B, rows); through the sigmoid when the gate is CWEM's
    taps: Tensor | None
    dz: Tensor | None  # (B, rows, H, pitch)
    direct: Tensor


def _sweep(
    grad: Tensor, x: Tensor, layout: Layout, numbers: Numbers, pieces: Prepared, gate: Tensor | None,
    needs_x: bool, needs_weights: bool, multiplicative: bool = False, offset: float = 1.0,
) -> Swept:  # fmt: skip
    clips, height, width = x.shape[0], *x.shape[3:]
    chosen, over = _cover("sweep", numbers, layout, x)
    mode = 2 if gate is not None else 1 if layout.hidden else 0
    rows, columns = layout.rows, layout.columns
    weights = needs_weights and layout.conv

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    def programs_of(kernel: str, chosen: Tile, tiles: int) -> int:
        return min(tiles, (chosen.programs or PROGRAMS[kernel]) * processors(x)[0])

    total = clips * over.tiles
    partial_gate = empty(total, rows) if mode else None
    half = numbers.split == 0 and numbers.dz != torch.float32
    pad, pitch = _pitch(width)
    dz = empty(clips, rows, height, pitch, dtype=numbers.dz if half else torch.float32) if layout.conv else None
    store_direct = needs_x and multiplicative
    direct = empty(*x.shape) if store_direct else grad
    launch(
        sweep, (programs_of("sweep", chosen, total),), x, grad, pieces.folded, pieces.bias, gate, pieces.means,
        pieces.cwem, dz, partial_gate, direct, *x.stride(), *grad.stride(), height, width, pitch, over.tiles_h,
        over.tiles, total, float(offset),
        **layout.grid(), CONV=layout.conv, HMEM=layout.hmem, GATE=mode, STENCIL_GROUP=layout.stencil_group,
        MULTIPLICATIVE=multiplicative, ONE=layout.one, CHUNKS=chunks(height, width),
        WIDE=wide(height, width, x.stride(), grad.stride()), STORE_DIRECT=store_direct, PAD=pad, **numbers.constants(),
        **over.constants(), STAGES=chosen.stages, **chosen.options(),
    )  # fmt: skip
    partial = partial_bias = None
    programs = 0
    if weights:
        heavy, spread = _cover("weigh", numbers, layout, x)
        total = clips * spread.tiles
        programs = programs_of("weigh", heavy, total)
        at_once = 3 if rows * columns <= 1024 else 1
        partial, partial_bias = empty(programs, 9, rows, columns), empty(programs, rows)
        layout_constants = {k: v for k, v in layout.grid().items() if k != "CP"}
        launch(
            weigh, (programs, 3 // at_once), x, dz, partial, partial_bias, *x.stride(), height, width, pitch,
            spread.tiles_h, spread.tiles, total, **layout_constants, ONE=layout.one, PAD=pad, WIDE=wide(height, width,
            x.stride()),
            ROWS_AT_ONCE=at_once, **numbers.constants(dz=True), **spread.constants(), **heavy.options(),
        )  # fmt: skip
    dfolded = empty(9, rows, columns) if weights else None
    dbias = empty(rows) if weights else None
    dgate = empty(clips, rows) if mode else None
    dtaps = empty(clips, layout.taps_numel) if mode == 1 else None
    own = -(-9 * rows * columns // REDUCE_COLUMNS) + 1 if weights else 0
    if own or mode:
        launch(
            reduce, (own + (clips if mode else 0),), partial, partial_bias, partial_gate, pieces.means, pieces.cwem,
            dfolded, dbias, dgate, dtaps, programs, over.tiles, height, width, **layout.grid(),
            CHUNKS=chunks(height, width), WEIGHTS=weights, GATE=mode > 0, POOL=mode == 1, ONE=layout.one,
            BP=REDUCE_ROWS, BC=REDUCE_COLUMNS, num_warps=4,
        )  # fmt: skip
    return Swept(dfolded, dbias, dgate, dtaps, dz, direct)


def _fuse_dx(x: Tensor, layout: Layout, numbers: Numbers, pieces: Prepared, swept: Swept, pool: bool) -> Tensor:
    height, width = x.shape[3:]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    pad, pitch = _pitch(width)
    chosen = tile("fuse_dx", numbers, layout, processors(x)[1])
    over = cover(
        height, width, chosen, width % 16 == 0, (x if swept.dz is None else swept.dz).element_size(), layout.conv
    )  # fmt: skip
    launch(
        fuse_dx, (x.shape[0] * over.tiles,), swept.dz, pieces.folded, swept.direct, swept.gate, pieces.cwem, dx,
        *swept.direct.stride(), height, width, pitch, over.tiles_w, over.tiles, **layout.grid(), CONV=layout.conv,
        POOL=pool, PAD=pad,
        WIDE=wide(height, width, swept.direct.stride()), **numbers.constants(), **over.constants(),
        STAGES=chosen.stages, **chosen.options(),
    )  # fmt: skip
    return dx


def _frames(x: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    if not channels_last:
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    b, t, c, height, width = x.shape
    return torch.empty((b, t, height, width, c), dtype=dtype, device=x.device).movedim(-1, 2)


def _hidden(w: Weights) -> int:
    return w.cwem.expand.shape[0] if w.cwem else 0


def _given(w: Weights) -> dict[str, Any]:
    """The weights under the names that prepare and finish know them by."""
    found: dict[str, Any] = {}
    if w.three_dem:
        found["stencil"] = w.three_dem.conv.contiguous()
    if w.cwem:
        found["expand"], found["temporal"] = w.cwem.expand.contiguous(), w.cwem.temporal.contiguous()
        found["temporal_bias"], found["squeeze"] = w.cwem.temporal_bias.contiguous(), w.cwem.squeeze.contiguous()
    if w.hmem:
        found["motion"], found["motion_bias"] = _contiguous(w.hmem.motion), _contiguous(w.hmem.motion_bias)
        found["project"], found["project_bias"] = _contiguous(w.hmem.project), _contiguous(w.hmem.project_bias)
        found["restore"], found["restore_bias"] = w.hmem.restore.contiguous(), w.hmem.restore_bias.contiguous()
    return found


def soap_forward(x: Tensor, weights: Sequence[Tensor], options: Options) -> tuple[Tensor, Tensor]:
    y = _frames(x, options.out_dtype, options.out_channels_last)
    prepared = torch.empty(prepared_numel(x, options), device=x.device)
    if not options.parts:
        return y.copy_(as_float(x, options.mean, options.std)), prepared
    w = options.unflatten(weights)
    layout, numbers = _layout(x, options, _hidden(w)), _numbers(x, options)
    if not layout.fits:
        frames, _, p, fused = _wide(x, weights, options)
        if options.out_dtype == frames.dtype:
            planes.forward(frames, p, fused, y, options.out_channels_last)
        else:
            full = torch.empty(x.shape, device=x.device)
            planes.forward(frames, p, fused, full, False)
            y.copy_(as_output(full, options.out_dtype, options.out_channels_last))
        return y, prepared
    pieces = Prepared.of(prepared, layout, numbers, x)
    normalization = _normalization(options)
    _prepare(x, layout, numbers, pieces, {**_given(w), **normalization})
    _fuse(
        x, layout, numbers, pieces, y, None, normalization["scale"], normalization["shift"],
        channels_last=options.out_channels_last,
    )  # fmt: skip
    return y, prepared


def soap_backward(
    grad: Tensor,
    x: Tensor,
    prepared: Tensor,
    weights: Sequence[Tensor],
    options: Options,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    if not options.parts:
        return grad if needs_x else None, []
    w = options.unflatten(weights)
    layout, numbers = _layout(x, options, _hidden(w)), _numbers(x, options)
    if not layout.fits:
        return _wide_backward(grad, x, weights, options, needs_x, needs_weights)
    pieces = Prepared.of(prepared, layout, numbers, x)
    swept = _sweep(grad, x, layout, numbers, pieces, None, needs_x, needs_weights)
    dweights: list[Tensor] = []
    if needs_weights:
        dweights = [torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in weights]
        names = [
            "motion",
            "motion_bias",
            "project",
            "project_bias",
            "restore",
            "expand",
            "temporal",
            "temporal_bias",
            "squeeze",
        ]
        outputs = "motion motion_bias project project_bias restore restore_bias stencil expand temporal temporal_bias"
        outputs += " squeeze"
        given = _given(w)
        found = _given(Weights.unflatten(dweights, options.parts, len(options.tuple_sizes)))
        launch(
            finish, (layout.finish_programs(),), swept.folded, swept.bias, swept.taps,
            **{name: given.get(name) for name in names}, **_normalization(options),
            **{"d" + name: found.get(name) for name in outputs.split()}, B=x.shape[0], **layout.grid(),
            **layout.folds(), STENCIL_GROUP=layout.stencil_group, NORMALIZE=layout.normalize, ONE=layout.one,
            num_warps=4,
        )  # fmt: skip
    dx = _fuse_dx(x, layout, numbers, pieces, swept, layout.hidden > 0) if needs_x else None
    return dx, dweights


def _wide(x: Tensor, weights: Sequence[Tensor], options: Options) -> tuple[Tensor, Weights, reference.Prepared, Fusion]:
    frames = x if options.mean is None else as_float(x, options.mean, options.std)
    w = options.unflatten(weights).to(torch.float32)
    additive = Fusion(False, 0.0, False, options.precision)
    return frames, w, reference.prepare(frames, w, options.tuple_sizes), additive


def _wide_backward(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], options: Options, needs_x: bool, needs_weights: bool
) -> tuple[Tensor | None, list[Tensor]]:
    frames, w, p, fusion = _wide(x, weights, options)
    dx, d = planes.backward(grad, frames, p, fusion, needs_x, needs_weights)
    return reference.finish(w, options.tuple_sizes, p, d, dx, x.shape[3] * x.shape[4])


def _fusion_layout(x: Tensor, priors: Priors) -> Layout:
    return Layout(x.shape[1], x.shape[2], (), 0, priors.weight is not None, priors.stencil is not None, False)


def _fusion_pieces(x: Tensor, priors: Priors, layout: Layout, numbers: Numbers, fusion: Fusion) -> Prepared:
    prepared = torch.empty(_slots(layout, numbers, *x.shape[::3], x.shape[4])[-1][0], device=x.device)
    pieces = Prepared.of(prepared, layout, numbers, x)
    if layout.conv:
        given = {"stencil": priors.stencil, "weight": priors.weight, "bias": priors.bias}
        _prepare(x, layout, numbers, pieces, given, interleaved=fusion.interleaved)
    return pieces


def fuse_priors(x: Tensor, priors: Priors, fusion: Fusion) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    layout, numbers = _fusion_layout(x, priors), Numbers.choose(x.dtype, x.dtype, fusion.precision)
    if not layout.fits:
        planes.forward(x, reference.given(x, priors, torch.float32), fusion, y, False)
        return y
    pieces = _fusion_pieces(x, priors, layout, numbers, fusion)
    _fuse(x, layout, numbers, pieces, y, priors.gate, multiplicative=fusion.multiplicative, offset=fusion.offset)
    return y


def fuse_priors_backward(
    grad: Tensor, x: Tensor, priors: Priors, fusion: Fusion, needs: Sequence[bool]
) -> list[Tensor | None]:
    given = (x, *priors)
    layout, numbers = _fusion_layout(x, priors), Numbers.choose(x.dtype, x.dtype, fusion.precision)
    needs_weights = needs[1] or needs[3] or needs[4]
    if not layout.fits:
        p = reference.given(x, priors, torch.float32)
        dx, d = planes.backward(grad, x, p, fusion, needs[0], needs_weights)
        return [dx, None if d.rows is None else unfold_three_dem(d.rows).conv, d.gate, d.weight, d.bias]
    pieces = _fusion_pieces(x, priors, layout, numbers, fusion)
    swept = _sweep(
        grad, x, layout, numbers, pieces, priors.gate, needs[0], needs_weights, fusion.multiplicative, fusion.offset
    )
    out = [
        torch.empty(v.shape, dtype=v.dtype, device=v.device) if need and v is not None else None
        for v, need in zip(given, needs, strict=True)
    ]
    if any(v is not None for v in out[1:]):
        size = 9 * (layout.frames * layout.channels) ** 2 if out[3] is not None else 0
        launch(
            finish_priors, (3 + -(-size // COPY_BLOCK),), swept.folded, swept.bias, swept.gate, *out[1:], x.shape[0],
            **layout.grid(), STENCIL_GROUP=layout.stencil_group, INTERLEAVED=fusion.interleaved, BLOCK=COPY_BLOCK,
            num_warps=4,
        )  # fmt: skip
    if needs[0]:
        out[0] = _fuse_dx(x, layout, numbers, pieces, swept, False)
    return out


def window_sums(x: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    out = torch.empty((n, channels, 3, 3), device=x.device)
    launch(
        window_sums_kernel, (n * channels,), x, out, channels, *x.stride(), height, width,
        WIDE=wide(height, width, x.stride()), BLOCK=PLANE_BLOCK, num_warps=8,
    )  # fmt: skip
    return out


def window_sums_backward(grad: Tensor, x: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (-(-height * width // COPY_BLOCK), n * channels)
    launch(window_sums_backward_kernel, grid, grad, dx, height, width, BLOCK=COPY_BLOCK, num_warps=4)
    return dx
