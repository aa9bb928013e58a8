"""SOAP-Net's parts: backbones, few-shot heads, and the whole model."""

from soap_net.models.backbones import Backbone, Built, build_backbone
from soap_net.models.heads import HEADS, FewShotHead, build_head
from soap_net.models.soap_net import SOAPNet, build_model

__all__ = ["HEADS", "Backbone", "Built", "FewShotHead", "SOAPNet", "build_backbone", "build_head", "build_model"]
