"""The exact folds: what SOAP's convolutions compose into, and the way back from the fold's gradient to each weight.

HMEM and CWEM are affine up to their sigmoids, so their convolutions and linear maps compose into one convolution and
one small affine map. Each ``fold_*`` stands beside its ``unfold_*``, the adjoint: given the gradient of the folded
weights it returns the gradient of every weight that went in. Planes are stacked frame-major, plane ``t * C + c``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from soap_kernels.weights import CWEMWeights, HMEMWeights, ThreeDEMWeights


def _windows(restore: Tensor, first_map: int, o: int) -> Tensor:
    """How much of frame s's place f in its tuple reaches frame t: ``(T, T, o + 1)``, [t, s, f] = restore[t, s - f].

    The tuple that starts at frame i reads frames i .. i + o - 1, and its successor's frames end at i + o, so a
    difference spans o + 1 frames; frame s is its f-th exactly if i = s - f.
    """
    frames = restore.shape[0]
    table = restore.new_zeros(frames, frames, o + 1)
    for f in range(o + 1):
        for i in range(frames - o):
            table[:, i + f, f] = restore[:, first_map + i]
    return table


def _differences(w: HMEMWeights, k: int, o: int, channels: int) -> Tensor:
    """Projected difference of one tuple as a 3x3 conv over its o + 1 frames: ``(C, o + 1, C, 3, 3)``."""
    project = w.project[k].view(channels, o * channels)
    moved = torch.einsum("pj,jqhw->pqhw", project, w.motion[k]).view(channels, o, channels, 3, 3)
    taps = torch.cat([torch.zeros_like(moved[:, :1]), -moved], 1)
    centre = torch.zeros_like(taps)
    centre[:, :o, :, 1, 1] = project.view(channels, o, channels)
    return taps + centre


def fold_hmem(w: HMEMWeights, tuple_sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """HMEM up to its sigmoid as one zero-padded 3x3 convolution: weight ``(TC, TC, 3, 3)`` and bias ``(TC,)``.

    Exact: difference, 3x3 conv, 1x1 conv and the linear map over the maps are all affine, and only the 3x3 conv looks
    beyond its pixel, so zero padding commutes with the rest.
    """
    frames, channels = w.restore.shape[0], w.project[0].shape[0]
    weight = w.restore.new_zeros(frames, channels, frames, channels, 3, 3)
    bias = w.restore_bias[:, None].expand(frames, channels)
    first_map = 0
    for k, o in enumerate(tuple_sizes):
        window = _windows(w.restore, first_map, o)
        weight = weight + torch.einsum("tsf,pfqhw->tpsqhw", window, _differences(w, k, o, channels))
        constant = w.project_bias[k] - w.project[k].flatten(1) @ w.motion_bias[k]
        bias = bias + w.restore[:, first_map : first_map + frames - o].sum(1)[:, None] * constant
        first_map += frames - o
    planes = frames * channels
    return weight.reshape(planes, planes, 3, 3), bias.reshape(planes)


def unfold_hmem(w: HMEMWeights, tuple_sizes: Sequence[int], dweight: Tensor, dbias: Tensor) -> HMEMWeights:
    """Gradients of HMEM's weights from those of its folded weight and bias: the adjoint of :func:`fold_hmem`."""
    frames, channels = w.restore.shape[0], w.project[0].shape[0]
    dweight = dweight.reshape(frames, channels, frames, channels, 3, 3)
    dbias = dbias.reshape(frames, channels)
    dmotion, dmotion_bias, dproject, dproject_bias, drestore = [], [], [], [], []
    first_map = 0
    for k, o in enumerate(tuple_sizes):
        planes = o * channels
        project = w.project[k].flatten(1)
        rows = w.restore[:, first_map : first_map + frames - o]
        constant = w.project_bias[k] - project @ w.motion_bias[k]
        dconstant = rows.sum(1) @ dbias
        ddifferences = torch.einsum("tsf,tpsqhw->pfqhw", _windows(w.restore, first_map, o), dweight)
        dmoved = -ddifferences[:, 1:].reshape(channels, planes, 3, 3)
        dmotion.append(torch.einsum("pj,pqhw->jqhw", project, dmoved))
        dmotion_bias.append(-project.T @ dconstant)
        through_centre = ddifferences[:, :o, :, 1, 1].reshape(channels, planes)
        through_motion = torch.einsum("pqhw,jqhw->pj", dmoved, w.motion[k])
        through_bias = torch.outer(dconstant, w.motion_bias[k])
        dproject.append((through_centre + through_motion - through_bias).view_as(w.project[k]))
        dproject_bias.append(dconstant)
        dwindow = torch.einsum("tpsqhw,pfqhw->tsf", dweight, _differences(w, k, o, channels))
        diagonals = [sum((dwindow[:, i + f, f] for f in range(o + 1)), dbias @ constant) for i in range(frames - o)]
        drestore.append(torch.stack(diagonals, 1))
        first_map += frames - o
    return HMEMWeights(dmotion, dmotion_bias, dproject, dproject_bias, torch.cat(drestore, 1), dbias.sum(1))


def fold_cwem(w: CWEMWeights) -> tuple[Tensor, Tensor]:
    """CWEM between pool and sigmoid as one conv over time: taps ``(3, C, C)`` and bias ``(C,)``.

    ``z[t] = bias + sum_k taps[k] @ mean[t + k - 1]``, means outside the clip zero: the expanding conv has no bias, so
    padding before and after it are the same.
    """
    squeeze, expand = w.squeeze.flatten(1), w.expand.flatten(1)
    return torch.einsum("pa,abk,bq->kpq", squeeze, w.temporal, expand), squeeze @ w.temporal_bias


def unfold_cwem(w: CWEMWeights, dtaps: Tensor, dbias: Tensor) -> CWEMWeights:
    """Gradients of CWEM's weights from those of its folded taps and bias: the adjoint of :func:`fold_cwem`."""
    squeeze, expand = w.squeeze.flatten(1), w.expand.flatten(1)
    dsqueeze = torch.einsum("kpq,abk,bq->pa", dtaps, w.temporal, expand) + torch.outer(dbias, w.temporal_bias)
    dtemporal = torch.einsum("kpq,pa,bq->abk", dtaps, squeeze, expand)
    dexpand = torch.einsum("kpq,pa,abk->bq", dtaps, squeeze, w.temporal)
    return CWEMWeights(dexpand.view_as(w.expand), dtemporal, squeeze.T @ dbias, dsqueeze.view_as(w.squeeze))


def fold_three_dem(w: ThreeDEMWeights, frames: int) -> Tensor:
    """3DEM's Conv3d as a 3x3 conv between frames of channel means: ``(T, T, 3, 3)``, three diagonals."""
    rows = w.conv.new_zeros(frames, frames, 3, 3)
    for k in range(3):
        for t in range(max(0, 1 - k), min(frames, frames + 1 - k)):
            rows[t, t + k - 1] = w.conv[0, 0, k]
    return rows


def unfold_three_dem(drows: Tensor) -> ThreeDEMWeights:
    """Gradient of 3DEM's weight from that of its rows: the adjoint of :func:`fold_three_dem`."""
    taps = [drows.diagonal(k - 1, 0, 1).sum(-1) for k in range(3)]
    return ThreeDEMWeights(torch.stack(taps)[None, None])


def fold_joint(weight: Tensor | None, rows: Tensor | None, channels: int, interleaved: bool) -> Tensor | None:
    """One convolution for HMEM and 3DEM: ``(TC, TC, 3, 3)`` with ``(T, TC, 3, 3)`` behind it, or what there is of both.

    Args:
        weight: HMEM folded, ``(TC, TC, 3, 3)``.
        rows: 3DEM between frames of channel means, ``(T, T, 3, 3)``.
        channels: C.
        interleaved: the mean of slot t takes the planes ``c T + t`` instead of ``t C + c``.
    """
    parts = [] if weight is None else [weight]
    if rows is not None:
        frames = rows.shape[0]
        plane = torch.arange(frames * channels, device=rows.device)
        parts.append(rows[:, plane % frames if interleaved else plane // channels] / channels)
    return torch.cat(parts) if parts else None


def unfold_joint(
    d: Tensor, weight: Tensor | None, rows: Tensor | None, channels: int, interleaved: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``weight`` and ``rows`` from that of :func:`fold_joint`, in fp32."""
    own = 0 if weight is None else weight.shape[0]
    dweight = None if weight is None else d[:own].float()
    if rows is None:
        return dweight, None
    t = rows.shape[0]
    shape = (t, channels, t, 3, 3) if interleaved else (t, t, channels, 3, 3)
    return dweight, d[own:].float().view(shape).sum(1 if interleaved else 2) / channels
