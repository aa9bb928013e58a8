"""Builds the native libraries of soap_kernels, with ninja: `pip install .` or `python setup.py build_ext --inplace`.

What cannot be built is left out with one plain warning: the package works without, on the PyTorch reference. Where a
compiler is there and a source file is not, the build fails. The CUDA library is also a distribution of its own, which
csrc/cuda/setup.py builds by means of this file.

Environment:
    SOAP_KERNELS_CPU = 0 | 1 | auto    the CPU library; 1: a failure to build it is an error (default auto)
    SOAP_KERNELS_CUDA = 0 | 1 | auto   the CUDA library, which needs nvcc and a PyTorch with CUDA but no GPU
    TORCH_CUDA_ARCH_LIST               what to build it for (default "8.0;9.0;10.0;12.0+PTX", as far as nvcc knows them)
    CXX                                the C++ compiler (default g++, else c++)
    SOAP_KERNELS_CXXFLAGS              more flags for it, e.g. "-fsanitize=address,undefined -g -O1"
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
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

    objects: list[tuple[str, str, list[str]]] = field(default_factory=list)  # (object, source, compiler and flags)
    link: list[str] = field(default_factory=list)


@dataclass
class Torch:
    """The PyTorch to build against. It is not imported: that takes seconds, and libraries that no build needs."""

    folder: Path
    version: str
    cuda: str | None

    @classmethod
    def find(cls) -> Torch:
        spec = find_spec("torch")
        if spec is None or spec.origin is None:
            raise CannotBuild("torch is missing in the building environment")
        folder = Path(spec.origin).parent
        facts = runpy.run_path(str(folder / "version.py"))
        return cls(folder, facts["__version__"], facts["cuda"])


def compiler() -> list[str]:
    """The C++ compiler's command: its path, and perhaps flags or, behind a wrapper such as ccache, the compiler."""
    for command in (shlex.split(os.environ.get("CXX", "")), ["g++"], ["c++"], ["clang++"]):
        if command and (found := shutil.which(command[0])):
            return [found, *command[1:]]
    raise CannotBuild("no C++ compiler was found (g++ 11 or newer, or set CXX)")


def more_flags() -> list[str]:
    return shlex.split(os.environ.get("SOAP_KERNELS_CXXFLAGS", ""))


def includes(torch: Torch) -> list[str]:
    try:
        import pybind11
    except ImportError as error:
        raise CannotBuild("pybind11 is missing in the building environment") from error
    # pybind11 first: torch brings a copy of its own, which refuses to be used with the stable ABI in some versions.
    return [f"-isystem{p}" for p in (pybind11.get_include(), torch.folder / "include", sysconfig.get_path("include"))]


def cpu_library() -> Library:
    """SOAP on the CPU: every stage for every instruction set, the backend that drives them, and the ops."""
    torch, cxx, more = Torch.find(), compiler(), more_flags()
    flags = [*OPTIMIZE, *WARNINGS, *more]
    isas = [0, 1, 2] if platform.machine().lower() in ("x86_64", "amd64") else [0]
    library = Library()
    for stage in STAGES:
        for isa in isas:
            # Contraction only where products are written as such anyway: the plain set has no fused multiply-add.
            isa_flags = [*flags, *ISA_FLAGS[isa], "-ffp-contract=fast", f"-DSOAP_ISA={isa}"]
            library.objects.append((f"{stage}.{isa}.o", f"csrc/cpu/{stage}.cpp", [*cxx, *isa_flags]))
    for source in ("fold", "reduce", "backend"):
        library.objects.append((f"{source}.o", f"csrc/cpu/{source}.cpp", [*cxx, *flags]))
    version = subprocess.run([*cxx, "--version"], capture_output=True, text=True, check=False).stdout
    defines = {
        "TORCH_TARGET_VERSION": TORCH_TARGET_MACRO,
        "SOAP_COMPILER": f'"{(version.splitlines() or ["unknown"])[0]}"',
        "SOAP_TORCH_VERSION": f'"{torch.version}"',
        "SOAP_TORCH_TARGET": f'"{TORCH_TARGET}"',
    }
    ops_flags = [*flags, *includes(torch), *(f"-D{k}={v}" for k, v in defines.items())]
    library.objects.append(("ops.o", "csrc/cpu/ops.cpp", [*cxx, *ops_flags]))
    # libtorch is loaded by `import torch` before this library, so no path to it is written down.
    library.link = [*cxx, "-shared", *more, f"-L{torch.folder / 'lib'}", "-ltorch_cpu"]
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
    torch = Torch.find()
    if torch.cuda is None:
        raise CannotBuild("this PyTorch is built without CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [f"{home}/bin"] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        raise CannotBuild("nvcc was not found (install the CUDA toolkit, or set CUDA_HOME)")
    cxx = compiler()
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found, major = re.search(r"release (\d+)\.", release), torch.cuda.split(".")[0]
    if found and found[1] != major:  # one CUDA runtime a process: PyTorch's
        raise CannotBuild(f"nvcc is of CUDA {found[1]}, this PyTorch of CUDA {torch.cuda}")
    toolkit = cuda_toolkit(nvcc)
    device = [nvcc, "-std=c++17", "-O3", "-ccbin", cxx[0], *cuda_architectures(nvcc)]
    device += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "--threads=2"]
    library = Library()
    for kernel in CUDA_KERNELS:
        library.objects.append((f"{kernel}.o", f"csrc/cuda/{kernel}.cu", device))
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_MACRO}", "-DUSE_CUDA"]
    ops_flags = [*OPTIMIZE, *WARNINGS, *more_flags(), *defines, *includes(torch), f"-isystem{toolkit / 'include'}"]
    library.objects.append(("ops.o", "csrc/cuda/ops.cpp", [*cxx, *ops_flags]))
    # libtorch and the CUDA runtime are loaded by `import torch` before this library.
    folders = [torch.folder / "lib", *(toolkit / d for d in ("lib64", "lib") if (toolkit / d).is_dir())]
    libraries = ["-ltorch_cuda", "-ltorch_cpu", f"-l:libcudart.so.{major}"]
    library.link = [*cxx, "-shared", *(f"-L{f}" for f in folders), *libraries]
    return library


# A further library is one more function here.
LIBRARIES = {
    "soap_kernels._cpp": ("SOAP_KERNELS_CPU", cpu_library),
    "soap_kernels._cuda": ("SOAP_KERNELS_CUDA", cuda_library),
}


def quoted(arguments: Iterable[str]) -> str:
    """Arguments as a shell gets them from a ninja file."""
    return " ".join(map(shlex.quote, arguments)).replace("$", "$$")


def write_ninja(library: Library, folder: Path, output: Path) -> Path:
    def escaped(path: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    lines = [
        "rule compile",
        "  command = $compile -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $link $in -o $out $libs",
    ]
    for name, source, command in library.objects:
        lines += [f"build {escaped(folder / name)}: compile {escaped(ROOT / source)}", f"  compile = {quoted(command)}"]
    objects = " ".join(escaped(folder / name) for name, _, _ in library.objects)
    link = [a for a in library.link if not a.startswith("-l")]
    libs = [a for a in library.link if a.startswith("-l")]
    lines += [f"build {escaped(output)}: link {objects}", f"  link = {quoted(link)}", f"  libs = {quoted(libs)}"]
    lines += [f"default {escaped(output)}", ""]
    path = folder / "build.ninja"
    path.write_bytes(os.fsencode("\n".join(lines)))
    return path


def missing_source(library: Library) -> Path | None:
    """A file that the library is made of and the checkout or sdist lacks, headers included."""
    files = [ROOT / source for _, source, _ in library.objects]
    for file in files:  # which grows
        if not file.is_file():
            return file
        named = re.findall(r'^#include "(.+)"', file.read_text(encoding="utf-8"), re.M)
        files += [f for name in named if (f := (file.parent / name).resolve()) not in files]
    return None


class BuildNative(build_ext):
    """Each library by ninja; one that cannot be built is left out, unless its switch says 1."""

    def build_extension(self, ext: Extension) -> None:
        switch, describe = LIBRARIES[ext.name]
        wanted = os.environ.get(switch, "auto")
        if wanted == "0":
            return
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            ninja, library = self._ninja(), describe()
            if (missing := missing_source(library)) is not None:
                raise SystemExit(f"{ext.name} cannot be built: {missing} is missing")
            self._build(library, ninja, output)
        except CannotBuild as why:
            output.unlink(missing_ok=True)  # an earlier build's
            if wanted == "1":
                raise SystemExit(f"{ext.name} cannot be built: {why}") from why
            message = f"{ext.name} is left out: {why}. Everything works without it, on the slower PyTorch reference."
            print(f"WARNING: {message}", file=sys.stderr)

    def _ninja(self) -> str:
        if not sys.platform.startswith("linux"):
            raise CannotBuild(f"the kernels are built on Linux only, not on {sys.platform}")
        ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
        if ninja is None:
            raise CannotBuild("ninja is missing (pip install ninja)")
        return ninja

    def _build(self, library: Library, ninja: str, output: Path) -> None:
        folder = Path(self.build_temp).resolve() / output.stem
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        path = write_ninja(library, folder, output)
        jobs = os.environ.get("MAX_JOBS")
        command = [ninja, "-f", str(path), *(["-j", jobs] if jobs else []), *(["-v"] if self.verbose > 1 else [])]
        if subprocess.run(command, cwd=folder, check=False).returncode:
            raise CannotBuild("the compiler failed (its messages are above)")


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(name, sources=[], optional=True) for name in LIBRARIES],
        cmdclass={"build_ext": BuildNative},
    )
