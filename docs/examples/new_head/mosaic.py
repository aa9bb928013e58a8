"""A backbone: a frame as a mosaic of so many tiles a side, each a few learned functions of its mean colour.

soap-net train --data.root DATA --model.backbone mosaic:16 --model.weights random
"""

from torch import nn

from soap_net.models import Backbone, Built

DIM = 64


def mosaic(name: str) -> Built:
    """Builds ``mosaic:<tiles a side>``; the whole name that was asked for comes in."""
    tiles = int(name.partition(":")[2] or 8)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(tiles), nn.Flatten(), nn.Linear(3 * tiles * tiles, DIM), nn.ReLU())
    return Built(Backbone(name, net, DIM), net)
