"""CUDA text as MLX's CUDA backend builds it, and the C++ that runs it here.

MLX generates this text only where it has its CUDA backend. The rules are those of
``mlx/backend/cuda/custom_kernel.cpp``: a fixed head, the caller's header, then one function in the
namespace ``mlx::core::cu`` whose parameters are plain pointers and whose template arguments are
constants at the top of the body.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import mlx.core as mx

from .errors import KernelTextError
from .metal_text import SHARED_SIZES, TYPE, Program, refuse_words, shared_array, without_comments
from .recording import KernelText

CUDA_TYPES = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
}

HEAD = """#include "mlx/backend/cuda/device/utils.cuh"

#include <cooperative_groups.h>

#define inf cuda::std::numeric_limits<float>::infinity()

"""

FORBIDDEN = {
    "try": "CUDA device code has no exceptions",
    "throw": "CUDA device code has no exceptions",
    "catch": "CUDA device code has no exceptions",
    "dynamic_cast": "CUDA device code has no run-time type information",
    "typeid": "CUDA device code has no run-time type information",
    "asm": "the emulator runs no inline assembly",
    "device": "an address space of Metal, which CUDA has not",
    "threadgroup": "an address space of Metal, which CUDA has not",
    "constant": "an address space of Metal, which CUDA has not",
}
"""Words that CUDA device code has not, or that the emulator cannot run."""

SHARED = re.compile(rf"\b__shared__\s+(?P<type>{TYPE})\s+(?P<name>\w+){SHARED_SIZES}")
POINTER = re.compile(rf"(?P<const>const )?(?P<type>{TYPE})\* (?P<name>\w+)")
BY_VALUE = re.compile(r"const __grid_constant__ (?P<type>Shape|Strides|int) (?P<name>\w+)")


def cuda_text(
    name: str,
    inputs: Mapping[str, mx.array],
    outputs: Mapping[str, mx.Dtype],
    source: str,
    header: str = "",
    template: Iterable[tuple[str, mx.Dtype | int | bool]] = (),
) -> KernelText:
    """The text MLX's CUDA backend would compile for one call.

    Args:
        name: Name of the kernel.
        inputs: Inputs by parameter name; only dtypes and dimension counts matter.
        outputs: Dtypes of the outputs by parameter name.
        source: The body.
        header: Text before the function.
        template: Names and values that become constants and types.
    """
    parameters = []
    for parameter, array in inputs.items():
        parameters.append(f"const {CUDA_TYPES[array.dtype]}* {parameter}")
        if array.ndim > 0:
            for suffix, kind in (("_shape", "Shape"), ("_strides", "Strides"), ("_ndim", "int")):
                if parameter + suffix in source:
                    parameters.append(f"const __grid_constant__ {kind} {parameter}{suffix}")
    parameters += [f"{CUDA_TYPES[dtype]}* {parameter}" for parameter, dtype in outputs.items()]
    function = f"custom_kernel_{name}"
    constants = []
    for constant, value in template:
        if isinstance(value, bool):
            function += "_t" if value else "_f"
            constants.append(f"  constexpr bool {constant} = {str(value).lower()};\n")
        elif isinstance(value, int):
            function += f"_{value}"
            constants.append(f"  constexpr int {constant} = {value};\n")
        else:
            function += f"_{str(value).removeprefix('mlx.core.')}"
            constants.append(f"  using {constant} = {CUDA_TYPES[value]};\n")
    listed = ",\n".join(f"    {parameter}" for parameter in parameters)
    return KernelText(
        function,
        f"{HEAD}{header}namespace mlx::core::cu {{\n\nnamespace cg = cooperative_groups;\n\n"
        f"__global__ void {function}(\n{listed}) {{\n{''.join(constants)}\n{source}\n}}\n\n"
        "} // namespace mlx::core::cu\n",
    )


def translate(text: KernelText) -> Program:
    """The C++ program of one CUDA kernel: parameters become checked pointers, includes go.

    Raises:
        KernelTextError: For words CUDA device code has not.
    """
    source = without_comments(text.source)
    source = re.sub(r"#include\s*[<\"][^>\"\n]*[>\"]", "", source)
    refuse_words(source, FORBIDDEN)
    start = f"__global__ void {text.name}(\n"
    begin = source.index(start) + len(start)
    end = source.index(") {\n", begin)
    declared: list[str] = []
    arguments: list[str] = []
    buffers: list[str] = []
    for parameter in source[begin:end].split(",\n"):
        given = f"buffers[{len(buffers)}]"
        if found := BY_VALUE.fullmatch(parameter.strip()):
            kind, name = found["type"], found["name"]
            declared.append(f"const {kind} {name}")
            arguments.append(
                f"*static_cast<const int*>({given}.data)" if kind == "int" else f"{kind}({given})"
            )
        elif found := POINTER.fullmatch(parameter.strip()):
            name = found["name"]
            held = (found["const"] or "") + found["type"]
            kind = f"::emulator::Pointer<::emulator::Space::device, {held}>"
            declared.append(f"{kind} {name}")
            arguments.append(f'{kind}({given}, "{name}")')
        else:
            raise KernelTextError(f"the emulator does not know the parameter `{parameter.strip()}`")
        buffers.append(name)
    source = source[:begin] + ",\n".join(declared) + source[end:]
    source = SHARED.sub(shared_array, source)
    call = ",\n      ".join(arguments)
    return Program(
        f'#include "cuda_words.h"\n#line 1 "{text.name}.cu"\n{source}\n#line 1 "entry"\n'
        "namespace mlx::core::cu {\n"
        'extern "C" void kernel_entry(const emulator::Buffer* buffers) {\n'
        f"  {text.name}(\n      {call});\n}}\n}}\n",
        tuple(buffers),
    )
