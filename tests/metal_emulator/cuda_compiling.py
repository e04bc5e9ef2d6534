"""Has NVIDIA's compiler check a CUDA text; no GPU is needed and none is used.

MLX compiles with NVRTC. Here `nvcc` is taken where it is, else NVRTC from the CUDA toolkit or from
the wheel ``nvidia-cuda-nvrtc``. MLX's own device header comes only with its CUDA wheels; its place
is taken by one that declares what a custom kernel may use of it.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

from .compiling import cache_folder
from .errors import KernelTextError, NoCompilerError
from .recording import KernelText

ARCHITECTURE = "compute_80"
DEVICE_HEADER = """#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
#include <cuda/std/limits>
namespace mlx::core::cu {
using Shape = cuda::std::array<int32_t, 10>;
using Strides = cuda::std::array<int64_t, 10>;
}
"""


def _cuda_include() -> Path | None:
    nvcc = shutil.which("nvcc")
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [Path(home) for home in (named, "/usr/local/cuda") if home]
    if nvcc:
        homes.append(Path(nvcc).resolve().parent.parent)
    for home in homes:
        if (home / "include" / "cuda_fp16.h").exists():
            return home / "include"
    return None


@functools.cache
def _nvrtc() -> ctypes.CDLL | None:
    found = [ctypes.util.find_library("nvrtc")]
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations or () if package else ():
        found += [str(path) for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.*"))]
    for name in filter(None, found):
        # Its builtins lie beside it and are looked up by name alone.
        for builtins in sorted(Path(name).parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(name)
    return None


def compile_cuda(text: KernelText, by: Literal["nvcc", "nvrtc"] | None = None) -> str:
    """The PTX of `text` for compute capability 8.0; compiled once per text and kept.

    Args:
        text: From `cuda_text`, or the `text` of an emulated CUDA kernel.
        by: The compiler to take; None takes nvcc, else NVRTC.

    Raises:
        NoCompilerError: Where the compiler is not there.
        KernelTextError: Where the compiler refuses the text, with what it says.
    """
    nvcc = shutil.which("nvcc") if by != "nvrtc" else None
    include = _cuda_include()
    if nvcc is None and by == "nvcc":
        raise NoCompilerError("no nvcc here: install the CUDA toolkit")
    if nvcc is None and (_nvrtc() is None or include is None):
        wanted = "no NVRTC" if by else "neither nvcc nor NVRTC"
        raise NoCompilerError(
            f"{wanted} with the CUDA headers here: install the CUDA toolkit, or "
            "pip install nvidia-cuda-nvrtc and let CUDA_HOME name the headers"
        )
    key = f"{nvcc}{include}{ARCHITECTURE}{DEVICE_HEADER}{text.source}"
    kept = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.ptx"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=kept.parent) as work:
            fresh = Path(work, "kernel.ptx")
            if nvcc is not None:
                _by_nvcc(nvcc, text, fresh)
            else:
                _by_nvrtc(text, str(include), fresh)
            os.replace(fresh, kept)
    return kept.read_text()


def _by_nvcc(nvcc: str, text: KernelText, target: Path) -> None:
    header = target.parent / "mlx/backend/cuda/device/utils.cuh"
    header.parent.mkdir(parents=True)
    header.write_text(DEVICE_HEADER)
    code = target.with_suffix(".cu")
    code.write_text(text.source)
    command = [nvcc, "-ptx", "-std=c++17", f"-arch={ARCHITECTURE}", f"-I{target.parent}"]
    told = subprocess.run([*command, str(code), "-o", str(target)], capture_output=True, text=True)
    if told.returncode:
        raise KernelTextError(f"nvcc rejects the kernel:\n{(told.stderr + told.stdout)[:6000]}")


def _by_nvrtc(text: KernelText, include: str, target: Path) -> None:
    nvrtc = _nvrtc()
    assert nvrtc is not None
    program = ctypes.c_void_p()
    headers = (ctypes.c_char_p * 1)(DEVICE_HEADER.encode())
    names = (ctypes.c_char_p * 1)(b"mlx/backend/cuda/device/utils.cuh")
    made = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), text.source.encode(), b"kernel.cu", 1, headers, names
    )
    if made:
        raise RuntimeError(f"NVRTC cannot start (error {made})")
    try:
        nvrtc.nvrtcAddNameExpression(program, f"mlx::core::cu::{text.name}".encode())
        includes = [include, str(Path(include, "cccl"))]
        options = ["-std=c++17", f"-arch={ARCHITECTURE}", *(f"-I{path}" for path in includes)]
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), given):
            raise KernelTextError(
                f"NVRTC rejects the kernel:\n{_take(program, 'ProgramLog')[:6000]}"
            )
        target.write_text(_take(program, "PTX"))
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _take(program: ctypes.c_void_p, what: str) -> str:
    nvrtc = _nvrtc()
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, text)
    return text.value.decode(errors="replace")
