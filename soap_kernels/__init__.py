"""SOAP (arXiv 2407.16344) as fused kernels that equal a plain PyTorch reference: a drop-in for any video model."""

import sys

from soap_kernels.backends import cpp
from soap_kernels.modules import CWEM, HMEM, SOAP, ThreeDEM
from soap_kernels.op import fuse_priors, soap, window_sums
from soap_kernels.plug import plug

sys.modules[f"{__name__}.cpp"] = cpp  # its former place, which programs that set its instruction set may import

__all__ = ["CWEM", "HMEM", "SOAP", "ThreeDEM", "fuse_priors", "plug", "soap", "window_sums"]
