"""Builds the native libraries of soap_kernels, with ninja: `pip install .` or `python setup.py build_ext --inplace`.

What cannot be built is left out with one plain warning: the package works without, on the PyTorch reference.

Environment:
    SOAP_KERNELS_CPU = 0 | 1 | auto    the CPU library; 1: a failure to build it is an error (default auto)
    SOAP_KERNELS_CUDA = 0 | 1 | auto   the CUDA library, which needs nvcc and a PyTorch with CUDA but no GPU
    TORCH_CUDA_ARCH_LIST               what to build it for (default "8.0;9.0;10.0;12.0+PTX", as far as nvcc knows them)
    CXX                                the C++ compiler (default g++, else c++)
    SOAP_KERNELS_SANITIZE              e.g. address,undefined
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# The stable ABI of this torch and every later one.
TORCH_TARGET = "2.10"
TORCH_TARGET_MACRO = "0x020a000000000000"

WARNINGS = ["-Wall", "-Wextra"]
OPTIMIZE = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
# Each stage is compiled once per instruction set (csrc/cpu/simd.h); which one runs is decided on the user's machine.
# GCC 12 warns about its own AVX-512 header, which leaves don't-care operands uninitialised on purpose (GCC bug 105593).
ISA_FLAGS = {
    0: [],
    1: ["-mavx2", "-mfma", "-mf16c"],
    2: ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c", "-Wno-maybe-uninitialized"],
}
STAGES = ("prepare", "fuse", "sweep")
CUDA_KERNELS = ("sweep", "exact", "fuse", "window_sums", "wide", "prepare", "finish", "reduce")  # the longest first
CUDA_ARCHITECTURES = (80, 90, 100, 120)


class CannotBuild(Exception):
    """Why a library cannot be built here, in one line."""


@dataclass
class Library:
    """One shared library: a Python extension module built by a ninja file of our own."""

    name: str  # the module, e.g. soap_kernels._cpp
    switch: str  # the environment variable that turns it on and off
    objects: list[tuple[str, str, list[str]]] = field(default_factory=list)  # (object, source, compiler and flags)
    link: list[str] = field(default_factory=list)


def compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "g++", "c++", "clang++")):
        if found := shutil.which(name.split()[0]):
            return " ".join([found, *name.split()[1:]])
    raise CannotBuild("no C++ compiler was found (g++ 11 or newer, or set CXX)")


def python_includes() -> list[str]:
    try:
        import pybind11
        import torch
    except ImportError as error:
        raise CannotBuild(f"{error.name} is missing in the building environment") from error
    torch_include = Path(torch.__file__).parent / "include"
    # pybind11 first: torch brings a copy of its own, which refuses to be used with the stable ABI in some versions.
    paths = [pybind11.get_include(), torch_include, sysconfig.get_path("include")]
    return [f"-isystem{p}" for p in paths]


def cpu_library() -> Library:
    """SOAP on the CPU: every stage for every instruction set, the backend that drives them, and the ops."""
    import torch

    cxx = compiler()
    sanitize = os.environ.get("SOAP_KERNELS_SANITIZE")
    extra = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-g", "-O1"] if sanitize else []
    flags = [*OPTIMIZE, *WARNINGS, *extra]
    isas = [0, 1, 2] if platform.machine().lower() in ("x86_64", "amd64") else [0]
    library = Library("soap_kernels._cpp", "SOAP_KERNELS_CPU")
    for stage in STAGES:
        for isa in isas:
            # Contraction only where products are written as such anyway: the plain set has no fused multiply-add.
            isa_flags = [*flags, *ISA_FLAGS[isa], "-ffp-contract=fast", f"-DSOAP_ISA={isa}"]
            library.objects.append((f"{stage}.{isa}.o", f"csrc/cpu/{stage}.cpp", [cxx, *isa_flags]))
    for source in ("fold", "reduce", "backend"):
        library.objects.append((f"{source}.o", f"csrc/cpu/{source}.cpp", [cxx, *flags]))
    version = subprocess.run([*cxx.split(), "--version"], capture_output=True, text=True, check=False).stdout
    defines = {
        "TORCH_TARGET_VERSION": TORCH_TARGET_MACRO,
        "SOAP_COMPILER": f'\\"{(version.splitlines() or ["unknown"])[0]}\\"',
        "SOAP_TORCH_VERSION": f'\\"{torch.__version__}\\"',
        "SOAP_TORCH_TARGET": f'\\"{TORCH_TARGET}\\"',
    }
    ops_flags = [*flags, *python_includes(), *(f"'-D{k}={v}'" for k, v in defines.items())]
    ops_flags = [f.replace('\\"', '"') if f.startswith("'") else f for f in ops_flags]
    library.objects.append(("ops.o", "csrc/cpu/ops.cpp", [cxx, *ops_flags]))
    torch_lib = Path(torch.__file__).parent / "lib"
    # libtorch is loaded by `import torch` before this library, so no path to it is written down.
    library.link = [cxx, "-shared", *extra, f"-L{torch_lib}", "-ltorch_cpu"]
    return library


def cuda_architectures(nvcc: str) -> list[str]:
    """Flags of nvcc for the architectures to build for: machine code for each, and PTX for the last, for later ones."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked:
        wanted = [a for a in asked.replace(",", ";").replace(" ", ";").split(";") if a]
    else:
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout.split()
        wanted = [f"{n // 10}.{n % 10}" for n in CUDA_ARCHITECTURES if f"sm_{n}" in known]
        if wanted:
            wanted[-1] += "+PTX"
    flags = []
    for name in wanted:
        number = name.removesuffix("+PTX").replace(".", "")
        if not number.rstrip("af").isdigit() or int(number.rstrip("af")) < 80:
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST names {name!r}, expected numbers like 9.0 of at least 8.0")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not flags:
        raise CannotBuild("this nvcc knows none of the architectures from sm_80 on")
    return flags


def cuda_toolkit(nvcc: str) -> Path:
    """The toolkit's folder, asked of nvcc itself, which may be a link or a script that lies elsewhere."""
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    plan = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.M)
    return Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parents[1]


def cuda_library() -> Library:
    """SOAP on NVIDIA GPUs. Needs nvcc and a PyTorch with CUDA, no GPU."""
    import torch

    if torch.version.cuda is None:
        raise CannotBuild("this PyTorch is built without CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [f"{home}/bin"] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        raise CannotBuild("nvcc was not found (install the CUDA toolkit, or set CUDA_HOME)")
    cxx = compiler()
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.", release)
    if found and found[1] != torch.version.cuda.split(".")[0]:  # one CUDA runtime a process: PyTorch's
        raise CannotBuild(f"nvcc is of CUDA {found[1]}, this PyTorch of CUDA {torch.version.cuda}")
    toolkit = cuda_toolkit(nvcc)
    device = [nvcc, "-std=c++17", "-O3", "-ccbin", cxx.split()[0], *cuda_architectures(nvcc)]
    device += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "--threads=2"]
    library = Library("soap_kernels._cuda", "SOAP_KERNELS_CUDA")
    for kernel in CUDA_KERNELS:
        library.objects.append((f"{kernel}.o", f"csrc/cuda/{kernel}.cu", device))
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_MACRO}", "-DUSE_CUDA"]
    includes = [*python_includes(), f"-isystem{toolkit / 'include'}"]
    library.objects.append(("ops.o", "csrc/cuda/ops.cpp", [cxx, *OPTIMIZE, *WARNINGS, *defines, *includes]))
    torch_lib = Path(torch.__file__).parent / "lib"
    # libtorch and the CUDA runtime are loaded by `import torch` before this library.
    paths = [f"-L{torch_lib}", *(f"-L{toolkit / d}" for d in ("lib64", "lib") if (toolkit / d).is_dir())]
    library.link = [cxx, "-shared", *paths, "-ltorch_cuda", "-ltorch_cpu", "-lcudart"]
    return library


# A further library is one more function here.
LIBRARIES = {
    "soap_kernels._cpp": ("SOAP_KERNELS_CPU", cpu_library),
    "soap_kernels._cuda": ("SOAP_KERNELS_CUDA", cuda_library),
}


def write_ninja(library: Library, folder: Path, output: Path) -> Path:
    def quote(path: Path | str) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        "rule compile",
        "  command = $compile -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $link $in -o $out $libs",
    ]
    for name, source, command in library.objects:
        lines += [f"build {quote(folder / name)}: compile {quote(ROOT / source)}", f"  compile = {' '.join(command)}"]
    objects = " ".join(quote(folder / name) for name, _, _ in library.objects)
    link = [a for a in library.link if not a.startswith("-l")]
    libs = [a for a in library.link if a.startswith("-l")]
    lines += [f"build {quote(output)}: link {objects}", f"  link = {' '.join(link)}", f"  libs = {' '.join(libs)}"]
    lines += [f"default {quote(output)}", ""]
    path = folder / "build.ninja"
    path.write_text("\n".join(lines))
    return path


class BuildNative(build_ext):
    """Each library by ninja; one that cannot be built is left out, unless its switch says 1."""

    def build_extension(self, ext: Extension) -> None:
        switch, describe = LIBRARIES[ext.name]
        wanted = os.environ.get(switch, "auto")
        if wanted == "0":
            return
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self._build(describe, output)
        except CannotBuild as why:
            if wanted == "1":
                raise SystemExit(f"{ext.name} cannot be built: {why}") from why
            message = f"{ext.name} is left out: {why}. Everything works without it, on the slower PyTorch reference."
            print(f"WARNING: {message}", file=sys.stderr)

    def _build(self, describe, output: Path) -> None:  # type: ignore[no-untyped-def]
        ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
        if ninja is None:
            raise CannotBuild("ninja is missing (pip install ninja)")
        includes_checked = python_includes()
        assert includes_checked
        folder = Path(self.build_temp).resolve() / output.stem
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        path = write_ninja(describe(), folder, output)
        jobs = os.environ.get("MAX_JOBS")
        command = [ninja, "-f", str(path), *(["-j", jobs] if jobs else []), *(["-v"] if self.verbose > 1 else [])]
        if subprocess.run(command, cwd=folder, check=False).returncode:
            raise CannotBuild("the compiler failed (its messages are above)")


setup(
    ext_modules=[Extension(name, sources=[], optional=True) for name in LIBRARIES],
    cmdclass={"build_ext": BuildNative},
)
