"""What the authors' published code computes, made trainable, repeatable and fast, behind the authors' interface.

The published ``TriplePrior`` differs from the paper. It makes seven of its convolutions anew, with random weights, in
every forward, and it takes slots for frames: ``reshape`` without a permute turns the T*C planes (frame, channel) of a
clip into C rows of T, so that slot t holds planes t, T + t, 2T + t. On frames x ``(B, T, C, H, W)``, slots
z ``(B, T, C, H, W)``, means over the pixels written as pool:

    P1 = s(Conv3d_3x3x3(mean_C(z)))                                                             (B, T, 1, H, W)
    P2 = s(conv_ch2(channel_diff(pool(conv_ch1(x)))))                                           (B, T, C, 1, 1)
    P3 = s(pool(mean over o in O and i of recover_o(z[i:i+o] - frame_diff_o(z[i+1:i+1+o]))))    (B, 1, C, 1, 1)
    y = (x * P1 + x) + (x * P2 + x) + (x * P3 + x) + x = x * (4 + P1 + P2 + P3)

``conv_ch1`` (3x3, C -> 16) and ``frame_diff`` (3x3, oC -> oC) only ever meet a pool, so nine sums a plane stand in for
them (`soap_kernels.window_sums`); ``channel_diff`` is a Conv1d from T to T frames that slides over the 16 channels;
``conv_ch2`` (3x3) meets one pixel, of which only its centre tap sees something. What is left is one pass over x with a
stencil and a gate (`soap_kernels.fuse_priors`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soap_kernels import op
from soap_kernels.frames import check_tensor, compute_dtype, without_autocast
from soap_kernels.held import Held, state_to_keep
from soap_kernels.weights import PARTS, count_maps

#: The convolutions that the published code makes anew in every forward, and so never saves.
UNSAVED = ("channel_diff", "frame_diff", "recover")


class ReleaseCWEM(NamedTuple):
    """``conv_ch1.weight`` (C_r, C, 3, 3), ``channel_diff`` (T, T, 3) and (T), ``conv_ch2.weight`` (C, C_r, 3, 3)."""

    ch1: Tensor
    diff: Tensor
    diff_bias: Tensor
    ch2: Tensor


class ReleaseHMEM(NamedTuple):
    """Per tuple size o: ``frame_diff`` (oC, oC, 3, 3) and (oC), ``recover`` (C, oC, 1, 1) and (C)."""

    diff: list[Tensor]
    diff_bias: list[Tensor]
    recover: list[Tensor]
    recover_bias: list[Tensor]


class ReleaseWeights(NamedTuple):
    """The weights of the parts that are on; ``stencil`` is ``conv_st.weight`` (1, 1, 3, 3, 3)."""

    stencil: Tensor | None
    cwem: ReleaseCWEM | None
    hmem: ReleaseHMEM | None

    def to(self, dtype: torch.dtype) -> ReleaseWeights:
        stencil = None if self.stencil is None else self.stencil.to(dtype)
        cwem = None if self.cwem is None else ReleaseCWEM(*(w.to(dtype) for w in self.cwem))
        hmem = None if self.hmem is None else ReleaseHMEM(*([w.to(dtype) for w in ws] for ws in self.hmem))
        return ReleaseWeights(stencil, cwem, hmem)


def release_convs(
    frames: int, channels: int, hidden_channels: int, tuple_sizes: Sequence[int], parts: Sequence[str]
) -> dict[str, nn.Module]:
    """The convolutions of the parts that are on, under the published names; ``frame_diff`` and ``recover`` by size."""
    convs: dict[str, nn.Module] = {}
    if "3dem" in parts:
        convs["conv_st"] = Held(1, 1, 3, 3, 3, bias=False)
    if "cwem" in parts:
        convs["conv_ch1"] = Held(hidden_channels, channels, 3, 3, bias=False)
        convs["conv_ch2"] = Held(channels, hidden_channels, 3, 3, bias=False)
        convs["channel_diff"] = Held(frames, frames, 3)
    if "hmem" in parts:
        op.check_tuple_sizes("HMEM", tuple_sizes, frames)
        planes = [o * channels for o in tuple_sizes]
        convs["frame_diff"] = nn.ModuleList(Held(p, p, 3, 3) for p in planes)
        convs["recover"] = nn.ModuleList(Held(channels, p, 1, 1) for p in planes)
    return convs


def release_weights(module: nn.Module, parts: Sequence[str]) -> ReleaseWeights:
    """The weights of `release_convs` held by ``module``."""

    convs: Any = module
    stencil = convs.conv_st.weight if "3dem" in parts else None
    cwem = hmem = None
    if "cwem" in parts:
        diff = convs.channel_diff
        cwem = ReleaseCWEM(convs.conv_ch1.weight, diff.weight, diff.bias, convs.conv_ch2.weight)
    if "hmem" in parts:
        both = (convs.frame_diff, convs.recover)
        hmem = ReleaseHMEM(*([getattr(conv, kind) for conv in some] for some in both for kind in ("weight", "bias")))
    return ReleaseWeights(stencil, cwem, hmem)


def slots(x: Tensor) -> Tensor:
    """The published code's "frames" of clips ``(B, T, C, ...)``: slot t holds planes t, T + t, 2T + t, ..."""
    b, t, c = x.shape[:3]
    return x.reshape(b, c, t, *x.shape[3:]).transpose(1, 2)


def equations(x: Tensor, w: ReleaseWeights, tuple_sizes: Sequence[int]) -> dict[str, Tensor]:
    """The priors of the parts that are on, written out convolution by convolution on full frames; the oracle.

    Args:
        x: ``(B, T, C, H, W)`` frames.
        w: weights, in x's dtype.
        tuple_sizes: O, ascending.

    Returns:
        By the part's name, in the shapes given above.
    """
    b, t, c = x.shape[:3]
    z = slots(x)
    found = {}
    if w.stencil is not None:
        a = z.mean(2).unsqueeze(1)
        found["3dem"] = torch.sigmoid(F.conv3d(a, w.stencil, padding=1)).transpose(1, 2)
    if w.cwem:
        pooled = F.conv2d(x.flatten(0, 1), w.cwem.ch1, padding=1).mean((2, 3)).unflatten(0, (b, t))
        mixed = F.conv1d(pooled, w.cwem.diff, w.cwem.diff_bias, padding=1)
        gate = F.conv2d(mixed.flatten(0, 1)[..., None, None], w.cwem.ch2, padding=1)
        found["cwem"] = torch.sigmoid(gate).view(b, t, c, 1, 1)
    if w.hmem:
        maps = []
        for k, o in enumerate(tuple_sizes):
            for i in range(t - o):
                now, then = z[:, i : i + o].flatten(1, 2), z[:, i + 1 : i + 1 + o].flatten(1, 2)
                difference = now - F.conv2d(then, w.hmem.diff[k], w.hmem.diff_bias[k], padding=1)
                maps.append(F.conv2d(difference, w.hmem.recover[k], w.hmem.recover_bias[k]))
        found["hmem"] = torch.sigmoid(torch.stack(maps, 1).mean(1).mean((2, 3))).view(b, 1, c, 1, 1)
    return found


def cwem_gate(sums: Tensor, w: ReleaseCWEM) -> Tensor:
    """P2, ``(B, T, C)``, from the window sums over the number of pixels, ``(B, T, C, 3, 3)``."""
    pooled = torch.einsum("btcij,rcij->btr", sums, w.ch1)
    mixed = F.conv1d(pooled, w.diff, w.diff_bias, padding=1)
    return torch.sigmoid(mixed @ w.ch2[:, :, 1, 1].T)


def hmem_gate(sums: Tensor, w: ReleaseHMEM, tuple_sizes: Sequence[int]) -> Tensor:
    """P3, ``(B, C)``, from the same; the mean over all maps is one over each size's first and second windows."""
    z = slots(sums)
    t = z.shape[1]
    total = z.new_zeros(z.shape[0], z.shape[2])
    for k, o in enumerate(tuple_sizes):
        # Planes of the windows i = 0 .. T-o-1 and of those one later, summed over i: (B, oC, 3, 3).
        now = torch.stack([z[:, f : f + t - o].sum(1) for f in range(o)], 1).flatten(1, 2)
        then = torch.stack([z[:, f + 1 : f + 1 + t - o].sum(1) for f in range(o)], 1).flatten(1, 2)
        convolved = torch.einsum("bpij,qpij->bq", then, w.diff[k]) + (t - o) * w.diff_bias[k]
        difference = now[:, :, 1, 1] - convolved
        total = total + difference @ w.recover[k][:, :, 0, 0].T + (t - o) * w.recover_bias[k]
    return torch.sigmoid(total / count_maps(t, tuple_sizes))


def release(
    x: Tensor, w: ReleaseWeights, tuple_sizes: Sequence[int], precision: str = "default", backend: str = "auto"
) -> Tensor:
    """``x * (n + 1 + the sum of the n priors that are on)``, in two passes over x.

    Args:
        x: ``(B, T, C, H, W)``, any floating dtype.
        w: weights, any floating dtype.
        tuple_sizes: O, ascending.
        precision, backend: as in :func:`soap_kernels.soap`; ``"equations"`` computes map by map.

    Returns:
        Like x, contiguous.
    """
    parts = sum(part is not None for part in w)
    dtype = compute_dtype(x)
    with without_autocast(x):
        w = w.to(dtype)
        if backend == "equations":
            frames = x.to(dtype)
            total = sum(equations(frames, w, tuple_sizes).values(), torch.zeros((), dtype=dtype, device=x.device))
            return (frames * (parts + 1 + total)).to(x.dtype).contiguous()
        gate = None
        if w.cwem or w.hmem:
            sums = op.window_sums(x.flatten(0, 1), backend).unflatten(0, x.shape[:2]) / (x.shape[3] * x.shape[4])
            gate = torch.zeros(x.shape[:3], dtype=dtype, device=x.device)
            if w.cwem:
                gate = gate + cwem_gate(sums, w.cwem)
            if w.hmem:
                gate = gate + hmem_gate(sums, w.hmem, tuple_sizes)[:, None]
        return op.fuse_priors(
            x,
            w.stencil,
            gate,
            multiplicative=True,
            offset=float(parts + 1),
            interleaved=True,
            precision=precision,
            backend=backend,
        )


def keep_unsaved(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook: a state_dict of the published code lacks what it never saved; the module's own values stay.

    With one warning. A state_dict that has some of these convolutions is not the published code's, and is left to the
    strict check.
    """
    own = [prefix + name for name in module.state_dict() if name.startswith(UNSAVED)]
    saved = [name for name in state if name.startswith(prefix + "conv_")]
    if own and saved and not any(name in state for name in own):
        kept = state_to_keep(module, state)
        state.update({name: kept[name.removeprefix(prefix)] for name in own})
        warnings.warn(
            f"the state_dict has no {', '.join(UNSAVED)}: the published code draws them anew in every forward and "
            "never saves them; they keep their initial values",
            stacklevel=2,
        )


class TriplePrior(nn.Module):
    """The authors' ``TriplePrior``, for their code and their checkpoints: ``TriplePrior()(x, seq_len)``.

    Its own convolutions are ordinary parameters here: trained, saved, the same in every forward. A state_dict of the
    published code loads strictly; what it lacks keeps its initial values, with one warning.

    Args:
        seq_len: T, frames of a clip.
        fresh_convs: a seed brings back the published behaviour: ``channel_diff``, ``frame_diff`` and ``recover`` are
            drawn anew in each forward (PyTorch's default initialisation), never trained, never saved; the n-th forward
            of a seed draws the same on every device. Activation checkpointing, which runs a forward a second time,
            would draw others there, and so give wrong gradients: leave this module out of it.
        backend, precision: as in :func:`soap_kernels.soap`.

    Raises:
        ValueError: a clip too short for tuples of 3 frames.
    """

    PARTS = PARTS
    TUPLE_SIZES = (1, 2, 3)
    CHANNELS = 3
    HIDDEN_CHANNELS = 16

    def __init__(
        self, seq_len: int = 8, fresh_convs: int | None = None, backend: str = "auto", precision: str = "default"
    ) -> None:
        super().__init__()
        op.check_tuple_sizes("TriplePrior", self.TUPLE_SIZES, seq_len)
        self.seq_len, self.fresh_convs, self.backend, self.precision = seq_len, fresh_convs, backend, precision
        self._forwards = 0
        for name, conv in self._convs(seq_len).items():
            if fresh_convs is None or name not in UNSAVED:
                self.add_module(name, conv)
        self.register_load_state_dict_pre_hook(keep_unsaved)

    def _convs(self, seq_len: int) -> dict[str, nn.Module]:
        return release_convs(seq_len, self.CHANNELS, self.HIDDEN_CHANNELS, self.TUPLE_SIZES, self.PARTS)

    def _fresh(self, seq_len: int, device: torch.device) -> ReleaseWeights:
        assert self.fresh_convs is not None
        holder = nn.Module()
        # Of the shapes alone; the weights are drawn below, without touching anybody else's random numbers.
        with torch.device("meta"):
            convs = self._convs(seq_len)
        generator = torch.Generator().manual_seed(self.fresh_convs * 1_000_003 + self._forwards)
        self._forwards += 1
        for name, conv in convs.items():
            holder.add_module(name, conv if name in UNSAVED else getattr(self, name))
        for conv in holder.modules():
            weight = getattr(conv, "weight", None)
            if isinstance(weight, Tensor) and weight.is_meta:
                bound = weight[0].numel() ** -0.5
                for kind in ("weight", "bias"):
                    drawn = torch.empty(getattr(conv, kind).shape).uniform_(-bound, bound, generator=generator)
                    setattr(conv, kind, nn.Parameter(drawn.to(device), requires_grad=False))
        return release_weights(holder, self.PARTS)

    def forward(self, x: Tensor, seq_len: int | None = None) -> Tensor:
        """``(B * seq_len, 3, H, W)`` in, the same out: ``x * (4 + P1 + P2 + P3)``.

        Raises:
            ValueError: frames of another shape, or a clip length other than the constructor's, for which
                ``channel_diff`` is made.
        """
        check_tensor(x)
        frames = self.seq_len if seq_len is None else seq_len
        if frames != self.seq_len and self.fresh_convs is None:
            raise ValueError(f"TriplePrior: seq_len is {frames}, but it was made for {self.seq_len}")
        if x.dim() != 4 or x.shape[1] != self.CHANNELS or x.shape[0] % frames:
            raise ValueError(
                f"TriplePrior: x has shape {tuple(x.shape)}, expected (clips * {frames}, {self.CHANNELS}, H, W)"
            )
        w = release_weights(self, self.PARTS) if self.fresh_convs is None else self._fresh(frames, x.device)
        clips = x.unflatten(0, (x.shape[0] // frames, frames))
        return release(clips, w, self.TUPLE_SIZES, self.precision, self.backend).flatten(0, 1)
