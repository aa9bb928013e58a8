"""Builds the distribution soap-kernels-cuda with the checkout's own setup.py, whose environment variables it takes."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from setup import BuildNative

os.environ["SOAP_KERNELS_CUDA"] = "1"  # without its library there is nothing to ship
# The library knows nothing of Python, so one wheel serves all of them.
setup(
    ext_modules=[Extension("soap_kernels._cuda", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildNative},
)
