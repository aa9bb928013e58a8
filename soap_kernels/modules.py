"""SOAP and its three parts as modules (arXiv 2407.16344, section 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from soap_kernels import backends, compat, equations, op
from soap_kernels.backends import reference
from soap_kernels.folded import FoldedSOAP
from soap_kernels.frames import as_float, as_output, check_tensor, compute_dtype, without_autocast
from soap_kernels.held import Held
from soap_kernels.weights import PARTS, CWEMWeights, HMEMWeights, ThreeDEMWeights, Weights, count_maps, sum_at_rest

STARTS = ("random", "differences")
# In standard deviations of the frames: a sharp edge that moved saturates the sigmoid, noise doesn't.
DIFFERENCE_GAIN = 2.0


def _check_backend(backend: str) -> None:
    known = (*backends.names(), "equations")
    if backend not in known:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(known)}")


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} is {value}, expected at least 1")
    return value


class _Part(nn.Module):
    """A part alone: called, x plus its prior."""

    part: str
    tuple_sizes: tuple[int, ...] = ()

    def __init__(self, backend: str) -> None:
        super().__init__()
        _check_backend(backend)
        self.backend = backend

    def weights(self) -> Weights:
        raise AttributeError(f"{type(self).__name__} holds no weights")

    def prior(self, x: Tensor) -> Tensor:
        """The prior alone, differentiable: ``(B, T, 1, H, W)`` for 3DEM, ``(B, T, C, 1, 1)`` for CWEM, x's for HMEM."""
        return _priors(x, self.weights(), self.tuple_sizes, self.backend)[self.part]

    def forward(self, x: Tensor) -> Tensor:
        """``x + prior(x)``, ``(B, T, C, H, W)`` in x's dtype."""
        w = self.weights()
        if self.backend == "equations":
            return equations.soap(x, w, self.tuple_sizes)
        return op.soap(x, w.flatten(), (self.part,), self.tuple_sizes, backend=self.backend)


def _priors(x: Tensor, w: Weights, tuple_sizes: Sequence[int], backend: str) -> dict[str, Tensor]:
    frames = x.to(compute_dtype(x))
    with without_autocast(x):
        return (equations if backend == "equations" else reference).priors(frames, w.to(frames.dtype), tuple_sizes)


class ThreeDEM(_Part):
    """3-Dimension Enhancement Module (Eqns 3-5): a Conv3d over the frames' channel means, sigmoid."""

    part = "3dem"

    def __init__(self, backend: str = "auto") -> None:
        super().__init__(backend)
        self.conv = Held(1, 1, 3, 3, 3, bias=False)

    def weights(self) -> Weights:
        return Weights(ThreeDEMWeights(self.conv.weight), None, None)


class CWEM(_Part):
    """Channel-Wise Enhancement Module (Eqns 6-9): pool, expand, Conv1d over time, squeeze, sigmoid."""

    part = "cwem"

    def __init__(self, channels: int = 3, hidden_channels: int = 16, backend: str = "auto") -> None:
        super().__init__(backend)
        _positive("channels", channels)
        _positive("hidden_channels", hidden_channels)
        self.expand = Held(hidden_channels, channels, 1, 1, bias=False)
        self.temporal = Held(hidden_channels, hidden_channels, 3)
        self.squeeze = Held(channels, hidden_channels, 1, 1, bias=False)

    def weights(self) -> Weights:
        assert self.temporal.bias is not None
        w = CWEMWeights(self.expand.weight, self.temporal.weight, self.temporal.bias, self.squeeze.weight)
        return Weights(None, w, None)


class HMEM(_Part):
    """Hybrid Motion Enhancement Module (Eqns 10-14): differences of frame tuples of several sizes, sigmoid.

    ``start`` is as in :class:`SOAP`.
    """

    part = "hmem"

    def __init__(
        self,
        frames: int = 8,
        channels: int = 3,
        tuple_sizes: Iterable[int] = (1, 2, 3),
        backend: str = "auto",
        start: str = "random",
    ) -> None:
        super().__init__(backend)
        _positive("channels", channels)
        self.tuple_sizes = tuple(sorted(tuple_sizes))
        op.check_tuple_sizes("HMEM", self.tuple_sizes, frames)
        planes = [o * channels for o in self.tuple_sizes]
        self.motion = nn.ModuleList(Held(p, p, 3, 3) for p in planes)
        self.project = nn.ModuleList(Held(channels, p, 1, 1) for p in planes)
        self.restore = Held(frames, count_maps(frames, self.tuple_sizes))
        if start not in STARTS:
            raise ValueError(f"start is {start!r}, expected one of {', '.join(STARTS)}")
        if start == "differences":
            self._start_from_differences()

    @torch.no_grad()
    def _start_from_differences(self) -> None:
        """Sets the weights so that before the sigmoid frame t holds +, - or 0 times the change over half a clip at t.

        Of the smallest tuples each first frame is compared with the next frame as it is, and Z adds up neighbouring
        differences: ``(x[i] - x[i+1]) + .. = x[i] - x[i+lag]``. Other tuples start unread, not unable to learn.
        """
        w = self.weights().hmem
        assert w is not None
        motion, project, restore = w.motion[0], w.project[0], w.restore
        frames, channels = restore.shape[0], project.shape[0]
        for tensor in (motion, w.motion_bias[0], project, w.project_bias[0], restore, w.restore_bias):
            tensor.zero_()
        motion[:channels, :channels, 1, 1] = torch.eye(channels, device=motion.device)
        for channel in range(channels):
            project[channel, :channels] = DIFFERENCE_GAIN / channels * (1.0, -1.0, 0.0)[channel % 3]
        maps = frames - self.tuple_sizes[0]
        lag = min(max(frames // 2, 1), maps)
        for t in range(frames):
            first = min(max(t - lag // 2, 0), maps - lag)
            restore[t, first : first + lag] = 1.0

    def weights(self) -> Weights:
        def tensors(convs: nn.ModuleList, name: str) -> list[Tensor]:
            return [getattr(conv, name) for conv in convs]

        motion = tensors(self.motion, "weight"), tensors(self.motion, "bias")
        project = tensors(self.project, "weight"), tensors(self.project, "bias")
        assert self.restore.bias is not None
        return Weights(None, None, HMEMWeights(*motion, *project, self.restore.weight, self.restore.bias))


class SOAP(nn.Module):
    """SOAP (Eqn 15): frames plus the priors of 3DEM, CWEM and HMEM, in front of any video model.

    Args:
        frames: T, frames of a clip.
        channels: C.
        tuple_sizes: O, HMEM's tuple sizes, each below T.
        hidden_channels: C_r of CWEM.
        parts: which of ``("3dem", "cwem", "hmem")`` are on; ``()`` is the identity.
        variant: ``"paper"``, the equations of the paper; ``"release"``, those of the authors' published code under its
            own names, its unsaved convolutions made parameters (:mod:`soap_kernels.compat`).
        backend: ``"auto"`` takes the best present for the input's device; else the name of one (``"equations"``, the
            unfolded oracle, included).
        precision: ``"default"``, ``"strict"`` or ``"fast"``, see :func:`soap_kernels.op.soap`.
        normalize: per-channel (mean, std) in units of 0..1: the input is uint8 frames, normalised on the way in.
        out_dtype: of the output; x's by default, fp32 for uint8 frames.
        out_channels_last: ``y.flatten(0, 1)`` comes out channels_last.
        centred: each prior less one half, which it is at rest: a fresh SOAP then hardly changes what a model that was
            trained without it sees. Of the paper's variant alone.
        start: HMEM's initial weights: ``"random"``, PyTorch's own, or ``"differences"``, from which it starts as the
            change over half a clip, so that little motion between frames is learned soon. The form is the same.

    Raises:
        ValueError: an impossible setting; the text names it.
    """

    def __init__(
        self,
        frames: int = 8,
        channels: int = 3,
        tuple_sizes: Iterable[int] = (1, 2, 3),
        hidden_channels: int = 16,
        parts: Iterable[str] = PARTS,
        variant: str = "paper",
        backend: str = "auto",
        precision: str = "default",
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
        out_dtype: torch.dtype | None = None,
        out_channels_last: bool = False,
        centred: bool = False,
        start: str = "random",
    ) -> None:
        super().__init__()
        chosen = (parts,) if isinstance(parts, str) else tuple(parts)
        if unknown := sorted(set(chosen) - set(PARTS)):
            raise ValueError(f"parts holds {unknown[0]!r}, expected some of {', '.join(PARTS)}")
        if variant not in ("paper", "release"):
            raise ValueError(f"variant is {variant!r}, expected 'paper' or 'release'")
        if centred and variant == "release":
            raise ValueError("centred is for variant 'paper': 'release' multiplies frames by about 5.5, centred by 4")
        if start != "random" and (variant == "release" or "hmem" not in chosen):
            raise ValueError(f"start is {start!r}, which needs variant 'paper' and HMEM among the parts")
        if precision not in backends.PRECISIONS:
            raise ValueError(f"precision is {precision!r}, expected one of {', '.join(backends.PRECISIONS)}")
        _check_backend(backend)
        self.hidden_channels = _positive("hidden_channels", hidden_channels)
        if out_dtype is not None and out_dtype not in op.FLOATS:
            raise ValueError(f"out_dtype is {out_dtype!r}, expected a floating dtype such as torch.float16")
        if normalize is not None and [len(numbers) for numbers in normalize] != [channels, channels]:
            raise ValueError(f"normalize is {normalize!r}, expected (mean, std) of {channels} channels each")
        self.frames, self.channels = _positive("frames", frames), _positive("channels", channels)
        self.tuple_sizes = tuple(sorted(tuple_sizes))
        self.parts = tuple(p for p in PARTS if p in chosen)
        self.variant, self.backend, self.precision = variant, backend, precision
        self.normalize, self.out_dtype, self.out_channels_last = normalize, out_dtype, out_channels_last
        self.centred, self.start = centred, start
        if variant == "release":
            convs = compat.release_convs(frames, channels, hidden_channels, self.tuple_sizes, self.parts)
            for name, conv in convs.items():
                self.add_module(name, conv)
            self.register_load_state_dict_pre_hook(compat.keep_unsaved)
            return
        if "3dem" in self.parts:
            self.three_dem = ThreeDEM(backend)
        if "cwem" in self.parts:
            self.cwem = CWEM(channels, hidden_channels, backend)
        if "hmem" in self.parts:
            self.hmem = HMEM(frames, channels, self.tuple_sizes, backend, start)

    def weights(self) -> Weights:
        """The paper's weights; the release's, of other shapes, are given by :func:`compat.release_weights`."""
        if self.variant == "release":
            raise ValueError("SOAP: variant 'release' has no weights of the paper's shapes")
        return Weights(
            self.three_dem.weights().three_dem if "3dem" in self.parts else None,
            self.cwem.weights().cwem if "cwem" in self.parts else None,
            self.hmem.weights().hmem if "hmem" in self.parts else None,
        )

    def _check(self, x: Tensor) -> None:
        check_tensor(x)
        if x.dim() != 5 or x.shape[1] != self.frames or x.shape[2] != self.channels:
            raise ValueError(
                f"SOAP: x has shape {tuple(x.shape)}, expected (B, T, C, H, W) with T = {self.frames} frames"
                f" and C = {self.channels} channels"
            )
        op.check_soap_dtype("SOAP", x, self.normalize is not None)

    def priors(self, x: Tensor) -> dict[str, Tensor]:
        """The prior of each part that is on, by its name, broadcastable to x; differentiable. For plots and study.

        As it is added to x: with ``centred`` less one half.
        """
        self._check(x)
        frames = self._as_float(x)
        if self.variant == "release":
            w = compat.release_weights(self, self.parts).to(frames.dtype)
            with without_autocast(x):
                return compat.equations(frames, w, self.tuple_sizes)
        found = _priors(frames, self.weights(), self.tuple_sizes, self.backend)
        return {part: prior - sum_at_rest([part]) for part, prior in found.items()} if self.centred else found

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, C, H, W)`` in, the same out: x (normalised if uint8) plus the priors.

        For the release x times their sum and n + 1, n the number of parts that are on.
        """
        self._check(x)
        if self.variant == "release":
            return self._release(x)
        if self.backend == "equations":
            y = equations.soap(self._as_float(x), self.weights(), self.tuple_sizes, self.centred)
            return as_output(y, self._out_dtype(x), self.out_channels_last)
        return op.soap(
            x,
            self.weights().flatten(),
            self.parts,
            self.tuple_sizes,
            self.precision,
            self.normalize,
            self.out_dtype,
            self.out_channels_last,
            self.backend,
            self.centred,
        )

    def _release(self, x: Tensor) -> Tensor:
        # Narrow frames are widened first where y is to be wider, so that nothing is rounded on the way.
        frames = x if self._out_dtype(x) == x.dtype else self._as_float(x)
        w = compat.release_weights(self, self.parts)
        y = compat.release(frames, w, self.tuple_sizes, self.precision, self.backend)
        return as_output(y, self._out_dtype(x), self.out_channels_last)

    @torch.no_grad()
    def folded(self) -> FoldedSOAP:
        """The same function, to 1e-5, with the weights of now, in plain layers that other runtimes take.

        Raises:
            ValueError: of the variant "release", which doesn't fold; ``backend="equations"`` makes that plain.
        """
        if self.variant == "release":
            raise ValueError("SOAP: variant 'release' doesn't fold; its backend 'equations' is in plain layers")
        shape = (self.frames, self.channels, self.tuple_sizes)
        offset = -sum_at_rest(self.parts) if self.centred else 0.0
        return FoldedSOAP(self.weights(), *shape, self.normalize, self.out_dtype, offset).eval()

    def _as_float(self, x: Tensor) -> Tensor:
        return as_float(x, *(self.normalize or (None, None)))

    def _out_dtype(self, x: Tensor) -> torch.dtype:
        return self.out_dtype or (torch.float32 if self.normalize is not None else x.dtype)

    def extra_repr(self) -> str:
        return (
            f"frames={self.frames}, channels={self.channels}, tuple_sizes={self.tuple_sizes}, parts={self.parts},"
            f" variant={self.variant!r}, backend={self.backend!r}, centred={self.centred}"
        )
