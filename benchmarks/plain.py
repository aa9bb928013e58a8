"""What the pipeline is timed against: a training step and a loader as the field's public code writes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.transforms import functional as frame

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PlainAttention(nn.Module):
    """TRX for one length of tuples: whole tuples are mapped, and a loop goes over the classes."""

    def __init__(self, dim: int, frames: int, length: int, out_dim: int) -> None:
        super().__init__()
        self.keys, self.values = nn.Linear(length * dim, out_dim), nn.Linear(length * dim, out_dim)
        self.norm = nn.LayerNorm(out_dim)
        self.tuples = [torch.tensor(chosen) for chosen in combinations(range(frames), length)]

    def forward(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """``(S, T, D)``, ``(S,)`` and ``(Q, T, D)`` to ``(Q, way)``."""
        supports, queries = (
            torch.stack([clips[:, chosen].flatten(1) for chosen in self.tuples], dim=1) for clips in (support, query)
        )
        support_keys, query_keys = self.norm(self.keys(supports)), self.norm(self.keys(queries))
        support_values, query_values = self.values(supports), self.values(queries)
        logits = []
        for label in labels.unique():
            mine = labels == label
            keys, values = support_keys[mine].flatten(0, 1), support_values[mine].flatten(0, 1)
            weights = (query_keys @ keys.T / keys.shape[1] ** 0.5).softmax(dim=-1)
            distance = (query_values - weights @ values).square().sum(dim=(1, 2))
            logits.append(-distance / len(self.tuples))
        return torch.stack(logits, dim=1)


class PlainTRX(nn.Module):
    """ResNet-18 on each frame, positions, dropout, and TRX with pairs and triples."""

    def __init__(self, frames: int = 8, out_dim: int = 1152) -> None:
        super().__init__()
        net = models.resnet18(weights=None)
        self.backbone = nn.Sequential(*list(net.children())[:-1], nn.Flatten())
        dim = net.fc.in_features
        time, rate = torch.arange(frames)[:, None], torch.exp(torch.arange(0, dim, 2) * (-np.log(10000.0) / dim))
        table = torch.zeros(frames, dim)
        table[:, 0::2], table[:, 1::2] = torch.sin(time * rate), torch.cos(time * rate)
        self.register_buffer("table", 0.1 * table)
        self.dropout = nn.Dropout(0.1)
        self.attentions = nn.ModuleList(PlainAttention(dim, frames, length, out_dim) for length in (2, 3))

    def forward(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Normalised float frames ``(clips, T, 3, H, W)`` to ``(Q, way)``."""
        clips = torch.cat([support, query])
        features = self.backbone(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
        features = self.dropout(features + self.table)
        support, query = features[: len(support)], features[len(support) :]
        return torch.stack([attention(support, labels, query) for attention in self.attentions]).mean(dim=0)


def plain_step(support: Tensor, labels: Tensor, query: Tensor, truth: Tensor) -> Callable[[], None]:
    """A training step on an episode of uint8 frames, which are normalised beforehand, as that loader does."""
    device = support.device
    model = PlainTRX(support.shape[1]).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
    support, query = ((clips / 255 - mean) / std for clips in (support, query))

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(support, labels, query), truth)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def plain_clip(folder: Path, frames: int, resize: int, crop: int, rng: np.random.Generator) -> Tensor:
    """A training clip from a folder of jpgs by PIL, frame by frame: float ``(frames, 3, crop, crop)``."""
    names = sorted(os.listdir(folder))
    bounds = np.linspace(0, len(names), frames + 1).astype(int)
    chosen = [int(rng.integers(low, high)) for low, high in pairwise(bounds)]
    images = [Image.open(folder / names[number]).convert("RGB") for number in chosen]
    images = [frame.resize(image, resize) for image in images]
    width, height = images[0].size
    top, left = int(rng.integers(height - crop + 1)), int(rng.integers(width - crop + 1))
    images = [frame.crop(image, top, left, crop, crop) for image in images]
    if rng.random() < 0.5:
        images = [frame.hflip(image) for image in images]
    return torch.stack([frame.normalize(frame.to_tensor(image), MEAN, STD) for image in images])
