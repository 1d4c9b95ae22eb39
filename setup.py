"""Builds `bert_fast._C`: the C++ kernels, and the CUDA ones where torch has CUDA and nvcc is found.

Everything else about the package is in pyproject.toml. A file whose name ends in `_avx2`,
`_avx512`, `_avx512_bf16` or `_amx` is compiled with that instruction set; which one runs is decided
by CPUID at run time, so one binary serves every x86-64. The extension uses torch's stable ABI and
Python's limited API: one build serves torch >= 2.11 and CPython >= 3.10.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

from setuptools import find_packages, setup

try:
    import torch
except ModuleNotFoundError:
    raise SystemExit(
        "bert_fast is compiled against the torch that will load it: install torch first, then use "
        "`pip install --no-build-isolation`"
    ) from None
from torch.utils.cpp_extension import (
    CUDA_HOME,
    BuildExtension,
    CppExtension,
    CUDAExtension,
    library_paths,
)

CSRC = Path("kernels/csrc")
# A file has what its name says and no more, whatever the compiler takes for granted (x86-64-v3 in
# some distributions) and CFLAGS ask for (-march=native): these flags come last.
BASE = ["-march=x86-64", "-Wno-psabi"]  # no vector is an argument but of what is inlined
AVX2 = [*BASE, "-mavx2", "-mfma", "-mf16c"]
# The warnings are GCC 12's about its own immintrin.h.
AVX512 = [*BASE, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX512_BF16 = [*AVX512, "-mavx512bf16", "-mavx512vnni"]
X86_FLAGS = {
    "dispatch": BASE,  # on its own, because it is emulated too
    "_generic": BASE,
    "_avx2": AVX2,
    "_avx512": AVX512,
    "_avx512_bf16": AVX512_BF16,
    "_amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
}
# `build_ext --emulate`, for tests on machines without them: AVX-512 and AMX by stand-ins, compiled
# for AVX2. The numbers are those of cpu/dispatch.h.
STAND_INS = ["-include", str(Path("tests/emulation/isa.h").resolve()), "-Wno-psabi", "-O0"]
EMULATED = {"dispatch": STAND_INS}
for suffix, isa in {"_avx512": 3, "_avx512_bf16": 5, "_amx": 6}.items():
    EMULATED[suffix] = [*STAND_INS, *AVX2, f"-DEMULATED_ISA={isa}"]
CXX = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fvisibility=hidden"]
# Nothing of the folder it was built in comes into a wheel.
MAPS = [f"-ffile-prefix-map={Path(p)}/=" for p in (Path.cwd(), Path(torch.__file__).parent)]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
NVCC = f"{CUDA_HOME}/bin/nvcc"
GPUS = ("80", "90a", "100a")  # where TORCH_CUDA_ARCH_LIST names no others


class BuildByISA(BuildExtension):
    """BuildExtension, with extra flags for the files that name an instruction set."""

    user_options: ClassVar = [*BuildExtension.user_options, ("emulate", None, "AVX-512 emulated")]
    boolean_options: ClassVar = [*BuildExtension.boolean_options, "emulate"]

    def initialize_options(self):
        super().initialize_options()
        self.emulate = False

    def finalize_options(self):
        self.build_temp = "build/objects"  # kept: an editable install would delete its own
        super().finalize_options()

    def build_extension(self, ext):
        if IS_X86:
            jobs = os.environ.get("MAX_JOBS", "")  # of compilers; as torch reads it
            most = int(jobs) if jobs.isdigit() else 0
            with ThreadPoolExecutor(most or None) as pool:  # half a minute each
                for sources, objects in pool.map(partial(self.compile, ext), X86_FLAGS):
                    ext.extra_objects += objects
                    ext.sources = [s for s in ext.sources if s not in sources]
        super().build_extension(ext)

    def compile(self, ext, suffix):
        """The sources whose names end so, and their objects."""
        sources = [s for s in ext.sources if Path(s).stem.endswith(suffix)]
        args, flags = ext.extra_compile_args, X86_FLAGS[suffix]
        temp = self.build_temp + suffix  # holds the state of a build, so one for each
        if self.emulate and suffix in EMULATED:
            flags, temp = EMULATED[suffix], f"build/emulated{suffix}"
        return sources, self.compiler.compile(
            sources,
            output_dir=temp,
            include_dirs=ext.include_dirs,
            extra_postargs={**args, "cxx": args["cxx"] + flags},
            depends=ext.depends,
        )


def output(*command):
    """What a program says, and whether it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr, done.returncode != 0


def why_no_cuda(gpus):
    """Why the CUDA kernels are not built; None where they are.

    The compiler must be there, not a device: a wheel is the same wherever it was built. One that
    does not fit (torch's CUDA, the C++ compiler, where its libraries are) is found out by an empty
    file, for else the whole install would fail, and Triton's kernels need none.
    """
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if CUDA_HOME is None or shutil.which(NVCC) is None:
        return "nvcc is not on the PATH, nor in CUDA_HOME"
    said, _ = output(NVCC, "--version")
    release = re.search(r"release (\d+)\.", said)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        return f"{NVCC} is not of torch's CUDA {torch.version.cuda}: {said.splitlines()[-1:]}"
    with TemporaryDirectory() as folder:
        source, built = Path(folder, "probe.cu"), Path(folder, "probe.o")
        source.write_text("__global__ void probe() {}\n")
        host = ("-ccbin", os.environ["CC"]) if os.environ.get("CC") else ()  # as torch has it
        flags = (*host, "-std=c++20", "-Xcompiler=-fPIC", *gpus)
        compiled = (NVCC, *flags, "-c", source, "-o", built)
        paths = [f"-L{path}" for path in library_paths("cuda")]
        linker = os.environ.get("CXX", "c++").split()
        linked = (*linker, "-shared", built, *paths, "-lcudart", "-o", Path(folder, "probe.so"))
        for command in (compiled, linked):
            said, failed = output(*command)
            if failed:
                return f"{command[0]} fails (is CUDA_HOME={CUDA_HOME} its folder?): {said.strip()}"
    return None


def extension():
    known, _ = output(NVCC, "--list-gpu-code") if shutil.which(NVCC) else ("", True)
    ours = [gpu for gpu in GPUS if f"sm_{gpu.rstrip('a')}" in known]
    gpus = [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in ours]
    gpus += ["-gencode=arch=compute_80,code=compute_80"]  # PTX, for what comes later
    gpus *= "TORCH_CUDA_ARCH_LIST" not in os.environ
    why = why_no_cuda(gpus)
    if why is not None:
        print(f"bert_fast is built without CUDA kernels: {why}", file=sys.stderr)
    patterns = ["*.cpp", "cpu/*.cpp"] + ["cuda/*.cu"] * (why is None)
    sources = sorted(str(path) for pattern in patterns for path in CSRC.glob(pattern))
    kind = CppExtension if why else CUDAExtension
    target = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11's stable ABI
    return kind(
        "bert_fast._C",
        sources,
        include_dirs=[str(CSRC.resolve())],
        depends=sorted(str(path) for path in CSRC.rglob("*.*h")),
        py_limited_api=True,
        extra_compile_args={
            "cxx": [*CXX, *MAPS, target],
            "nvcc": ["-O3", "-std=c++20", "-DUSE_CUDA", target]
            + [f"-Xcompiler={option}" for option in MAPS]
            + gpus,
        },
    )


setup(
    packages=[*find_packages(include=["bert_fast", "bert_fast.*"]), "bert_fast._triton"],
    package_dir={"bert_fast._triton": "kernels/_triton"},
    package_data={"bert_fast": ["py.typed"]},
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildByISA},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
