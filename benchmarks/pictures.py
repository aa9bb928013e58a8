"""`python -m benchmarks.pictures RESULTS CHECKPOINT CLIP OUT`: the pictures of README, OUT/speed.png and OUT/soap.png.

Speed is drawn from a recorded result of `python -m benchmarks`; what SOAP does to a clip, from a net that was trained.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray

from soap_net.checkpoint import load_model
from soap_net.data.clips import Clip
from soap_net.data.transforms import clip_loader

FORMS = {"plain": "plain PyTorch", "plain compiled": "torch.compile of it", "soap": "soap_kernels"}


def draw_speed(results: Path, out: Path) -> None:
    """Milliseconds of SOAP, forward and with backward, and SOAP's share of a backbone's time."""
    found = json.loads(results.read_text())
    figure, (times, shares) = plt.subplots(1, 2, figsize=(9, 2.6), width_ratios=(3, 2), layout="constrained")
    places = np.arange(len(FORMS))
    for offset, (kind, name) in zip(
        (-0.2, 0.2), {"forward": "forward", "training": "with backward"}.items(), strict=True
    ):
        values = [found[kind][form]["median"] for form in FORMS]
        bars = times.barh(places + offset, values, 0.4, label=name)
        times.bar_label(bars, [f" {value:,.0f} ms" for value in values], fontsize=8)
    times.set(yticks=places, yticklabels=FORMS.values(), xscale="log", xlim=(5, 4000), xlabel="ms, logarithmic")
    times.set_title("6 clips of 8 frames of 224 x 224", fontsize=10)
    times.invert_yaxis()
    times.legend(fontsize=8, loc="lower right")
    backbones = found["backbones"]
    values = [100 * backbone["share training"] for backbone in backbones.values()]
    shares.bar_label(
        shares.barh([*backbones], values, 0.5, color="C2"), [f" {value:.1f} %" for value in values], fontsize=8
    )
    shares.set(xlim=(0, 2), xlabel="SOAP's share of a training step, %")
    shares.invert_yaxis()
    machine = found["machine"]
    shares.set_title(f"{machine['processor']}, {machine['threads']} threads", fontsize=10)
    figure.savefig(out, dpi=100)


@torch.inference_mode()
def draw_soap(checkpoint: Path, clip: Path, out: Path) -> None:
    """The frames of a clip, the priors of 3DEM and HMEM (the mean of its channels), and what the backbone sees."""
    model, config = load_model(checkpoint, torch.device("cpu"), backend="auto")
    assert model.soap is not None
    frames = clip_loader(config.data, train=False)(Clip(clip))[None]
    priors = model.soap.priors(frames)
    seen = model.soap(frames)[0].float().mean(1)
    rows: dict[str, NDArray[Any]] = {
        "frames": frames[0].float().mean(1).numpy(),
        "3DEM": priors["3dem"][0, :, 0].float().numpy(),
        "HMEM": priors["hmem"][0].float().mean(1).numpy(),
        "sum": seen.numpy(),
    }
    count = len(seen)
    figure, axes = plt.subplots(len(rows), count, figsize=(count, len(rows)), layout="constrained")
    for line, (name, planes) in zip(axes, rows.items(), strict=True):
        low, high = np.percentile(planes, (1, 99))
        for axis, plane in zip(line, planes, strict=True):
            axis.imshow(
                plane, "gray" if name in ("frames", "sum") else "magma", vmin=low, vmax=high, interpolation="nearest"
            )
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    figure.savefig(out, dpi=80)


def main() -> None:
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    results, checkpoint, clip, out = map(Path, sys.argv[1:])
    draw_speed(results, out / "speed.png")
    draw_soap(checkpoint, clip, out / "soap.png")


if __name__ == "__main__":
    main()
