"""SOAP (arXiv 2407.16344) as fused kernels that equal a plain PyTorch reference: a drop-in for any video model."""

from soap_kernels.modules import CWEM, HMEM, SOAP, ThreeDEM
from soap_kernels.op import fuse_priors, soap, window_sums
from soap_kernels.plug import plug

__all__ = ["CWEM", "HMEM", "SOAP", "ThreeDEM", "fuse_priors", "plug", "soap", "window_sums"]
