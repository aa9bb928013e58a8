"""SOAP in front of a timm model: an ordinary classifier of clips, trained as one trains such models.

    soap-net data motion data/motion
    python docs/examples/timm_model.py data/motion            # with SOAP
    python docs/examples/timm_model.py data/motion --plain    # without: single frames don't show where things move

The classes are those of the data set's training split; of each a quarter of the clips is kept for testing.
"""

import argparse
from pathlib import Path

import numpy as np
import timm
import timm.optim
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from soap_kernels import plug
from soap_net.data.clips import Clip
from soap_net.data.splits import load_split
from soap_net.data.transforms import ClipLoader

FRAMES = 8


class LabelledClips(Dataset):
    """Clips with their labels: ``(8, 3, size, size)`` uint8 frames, drawn anew each time in training."""

    def __init__(self, pairs: list[tuple[Clip, int]], size: int, train: bool) -> None:
        self.pairs = pairs
        self.read = ClipLoader(resize=size, crop=size, flip=False, train=train)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        clip, label = self.pairs[place]
        return self.read(clip, np.random.default_rng(torch.randint(2**31, ()).item())), label


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="a data set in any layout of soap-net's")
    parser.add_argument("--model", default="resnet18", help="any image model of timm's")
    parser.add_argument("--pretrained", action="store_true", help="with timm's weights, which are downloaded")
    parser.add_argument("--plain", action="store_true", help="without SOAP")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--size", type=int, default=32, help="sides of a frame, in pixels")
    options = parser.parse_args()
    torch.manual_seed(0)

    found = load_split(options.root, "train")
    sides: tuple[list, list] = [], []
    for label, clips in enumerate(found.clips):
        for place, clip in enumerate(clips):
            sides[place % 4 == 0].append((clip, label))
    train, test = (LabelledClips(pairs, options.size, pairs is sides[0]) for pairs in sides)

    net = timm.create_model(options.model, pretrained=options.pretrained, num_classes=len(found.classes))
    statistics = net.pretrained_cfg["mean"], net.pretrained_cfg["std"]
    # SOAP takes uint8 frames, normalises them and adds its priors, in one pass; without parts it normalises alone.
    model = plug(net, frames=FRAMES, normalize=statistics, parts=() if options.plain else ("3dem", "cwem", "hmem"))
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=2e-3)

    def scores(clips: torch.Tensor) -> torch.Tensor:
        """An image model sees the frames of all clips; a clip's scores are the mean over its frames."""
        return model(clips.flatten(0, 1)).unflatten(0, (-1, FRAMES)).mean(dim=1)

    for epoch in range(options.epochs):
        model.train()
        for clips, labels in DataLoader(train, batch_size=16, shuffle=True):
            loss = F.cross_entropy(scores(clips), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            right = sum((scores(clips).argmax(1) == labels).sum().item() for clips, labels in DataLoader(test, 16))
        accuracy = 100 * right / len(test)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy {accuracy:.1f} % on {len(test)} other clips")


if __name__ == "__main__":
    main()
