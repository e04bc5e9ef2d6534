"""Runs GPU kernels on a machine without a GPU, so that tests can prove them.

`metal_kernel` and `cuda_kernel` take the place of ``mx.fast.metal_kernel`` and
``mx.fast.cuda_kernel``. The text MLX generates (recording.py) is put behind small headers
(metal_words.h, cuda_words.h), compiled by the machine's C++ compiler (compiling.py) and run in a
child process (child.py, runner.cpp), one fiber per GPU thread, SIMD groups in lock-step. What a
GPU would answer with garbage is an error here: test_metal_emulator_faults.py shows each of them.

`compile_cuda` and `lint` ask the compilers of NVIDIA and of LLVM where those are installed.
"""

from .child import Order
from .compiling import find_compiler
from .cuda_compiling import compile_cuda
from .cuda_text import cuda_text
from .errors import KernelFaultError, KernelTextError, NoCompilerError
from .factory import EmulatedKernel, cuda_kernel, metal_kernel
from .lint import lint
from .recording import KernelText, record_metal

__all__ = [
    "EmulatedKernel",
    "KernelFaultError",
    "KernelText",
    "KernelTextError",
    "NoCompilerError",
    "Order",
    "compile_cuda",
    "cuda_kernel",
    "cuda_text",
    "find_compiler",
    "lint",
    "metal_kernel",
    "record_metal",
]
