"""From Metal text to C++ that any compiler takes, line by line.

Only four things are rewritten, so that what is compiled stays the text that MLX generated:
declarations with an address space become the checked types of memory.h, threadgroup arrays become
`SharedArray`, the explicit instantiation with its host name is cut off, and comments are blanked.
Line numbers are kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import KernelTextError
from .recording import KernelText

SPACES = "device|constant|threadgroup"
TYPE = r"(?:(?:unsigned|signed)\s+)?(?!const\b)[A-Za-z_]\w*(?:::\w+)*(?:<[^<>;(){}]*>)?"
POINTER = re.compile(
    rf"\b(?P<before>const\s+)?(?P<space>{SPACES})\s+(?P<after>const\s+)?(?P<type>{TYPE})"
    rf"\s*(?P<behind>\bconst\b\s*)?(?P<mark>[*&])"
)
SHARED_SIZES = r"(?P<sizes>(?:\s*\[[^\]]+\])+)"
SHARED = re.compile(rf"\bthreadgroup\s+(?P<type>{TYPE})\s+(?P<name>\w+){SHARED_SIZES}")
INSTANTIATION = re.compile(
    r"\ntemplate \[\[host_name\([^\n]*?\)\]\] \[\[kernel\]\] decltype\((?P<function>.*?)\) ", re.S
)
PARAMETER = re.compile(
    r"(?P<const>const )?(?P<space>device|constant) (?P<type>\S+?)(?P<mark>[*&]) (?P<name>\w+) "
    r"\[\[buffer\((?P<index>\d+)\)\]\]"
)
ATTRIBUTE = re.compile(r"(?P<type>uint3?) (?P<name>\w+) \[\[(?P=name)\]\]")

FORBIDDEN = {
    "double": "Metal has no double",
    "std": "Metal has no std; the functions are in metal::",
    "try": "Metal has no exceptions",
    "throw": "Metal has no exceptions",
    "catch": "Metal has no exceptions",
    "new": "Metal allocates nothing",
    "delete": "Metal allocates nothing",
    "malloc": "Metal allocates nothing",
    "virtual": "Metal has no virtual functions",
    "dynamic_cast": "Metal has no run-time type information",
    "typeid": "Metal has no run-time type information",
    "goto": "Metal has no goto",
    "asm": "Metal has no inline assembly",
    "thread_local": "Metal has no thread_local",
    "printf": "Metal has no printf; MLX compiles without its logging",
}
"""Words of C++ that Metal has not, and why."""

NUMBERS = "bool|char|uchar|short|ushort|int|uint|long|ulong|size_t|float|half|bfloat|u?int\\d+_t"

ATTRIBUTES = {
    "dispatch_threads_per_threadgroup": "three(launch_now.group_size)",
    "grid_size": "three(launch_now.grid)",
    "simdgroup_index_in_threadgroup": "thread_now->simd_group",
    "simdgroups_per_threadgroup": "(product(launch_now.this_size) + 31) / 32",
    "thread_execution_width": "32u",
    "thread_index_in_simdgroup": "thread_now->lane",
    "thread_index_in_threadgroup": "index_in_group()",
    "thread_position_in_grid": "three(thread_now->position)",
    "thread_position_in_threadgroup": "three(thread_now->local)",
    "threadgroup_position_in_grid": "three(launch_now.group)",
    "threadgroups_per_grid": "three(launch_now.groups)",
    "threads_per_grid": "three(launch_now.grid)",
    "threads_per_simdgroup": "32u",
    "threads_per_threadgroup": "three(launch_now.this_size)",
}
"""Kernel attributes and the expression of runtime.h or metal_words.h that gives each."""


@dataclass(frozen=True)
class Program:
    """C++ of one kernel, and the buffers its entry takes, in order.

    A buffer is named after the array it holds; `x_shape`, `x_strides` and `x_ndim` are those of
    the input `x`.
    """

    source: str
    buffers: tuple[str, ...]


def without_comments(text: str) -> str:
    """`text` with every comment blanked and every line break kept."""
    blank = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
    return blank.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def refuse_words(text: str, forbidden: dict[str, str]) -> None:
    """Raises `KernelTextError` at the first word of `forbidden` in `text`."""
    for found in re.finditer(r"[A-Za-z_]\w*", text):
        if found[0] in forbidden:
            line = text.count("\n", 0, found.start()) + 1
            raise KernelTextError(f"line {line}: `{found[0]}`: {forbidden[found[0]]}")


def _checked_type(found: re.Match[str]) -> str:
    const = "const " if found["before"] or found["after"] or found["behind"] else ""
    kind = "Pointer" if found["mark"] == "*" else "Reference"
    return f"::emulator::{kind}<::emulator::Space::{found['space']}, {const}{found['type']}>"


def shared_array(found: re.Match[str]) -> str:
    """The checked declaration of a matched `threadgroup` or `__shared__` array."""
    sizes = ", ".join(re.findall(r"\[([^\]]+)\]", found["sizes"]))
    name = found["name"]
    return f'static ::emulator::SharedArray<{found["type"]}, {sizes}> {name}("{name}")'


def _refuse_bare_pointers(text: str) -> None:
    """In Metal a pointer or reference that names no address space is an error."""
    types = "|".join([NUMBERS, *re.findall(r"\btypename\s+(\w+)", text)])
    qualified = re.compile(rf"\bthread\s+(?:const\s+)?(?:{types})\s*(?:const\s*)?[*&]")
    rest = qualified.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    bare = re.search(rf"\b(?:{types})\s*[*&]\s*(?:const\s+)?\w+", rest)
    if bare:
        line = rest.count("\n", 0, bare.start()) + 1
        raise KernelTextError(
            f"line {line}: `{bare[0]}` names no address space; "
            "write `device`, `constant`, `threadgroup` or `thread` before the type"
        )


def _refuse_leftovers(text: str) -> None:
    # `Space::device` is ours; what stands alone was not understood.
    for found in re.finditer(rf"(?<!Space::)\b(?:{SPACES})\b", text):
        line = text.count("\n", 0, found.start()) + 1
        raise KernelTextError(
            f"line {line}: the emulator does not understand this use of `{found[0]}`; "
            "declare `space type* name`, `space type& name` or `threadgroup type name[size]`"
        )


def translate(text: KernelText) -> Program:
    """The C++ program of one recorded Metal kernel.

    Raises:
        KernelTextError: For words Metal has not, pointers without an address space, includes, and
            address spaces in a declaration this module does not understand.
    """
    source = without_comments(text.source)
    instantiation = INSTANTIATION.search(source)
    function = instantiation["function"] if instantiation else text.name
    if instantiation:
        source = source[: instantiation.start()] + "\n"
    refuse_words(source, FORBIDDEN)
    source = re.sub(r"#include\s*<metal_\w+>", "", source)
    if "#include" in source:
        raise KernelTextError("`#include` of a file: MLX gives Metal's compiler no include path")
    parameters = re.search(
        rf"\[\[kernel\]\] void {re.escape(text.name)}\(\n(.*?)\) \{{\n", source, re.S
    )
    if parameters is None:
        raise KernelTextError(f"no kernel function {text.name} in the text that MLX generated")
    buffers, arguments = _entry_arguments(parameters[1])
    checked = POINTER.sub(_checked_type, SHARED.sub(shared_array, source))
    _refuse_leftovers(checked)
    _refuse_bare_pointers(checked)
    call = ",\n      ".join(arguments)
    return Program(
        f'#include "metal_words.h"\n#line 1 "{text.name}.metal"\n{checked}\n#line 1 "entry"\n'
        f'extern "C" void kernel_entry(const emulator::Buffer* buffers) {{\n'
        f"  using namespace emulator;\n  ::{function}(\n      {call});\n}}\n",
        tuple(buffers),
    )


def _entry_arguments(parameters: str) -> tuple[list[str], list[str]]:
    buffers: list[str] = []
    arguments: list[str] = []
    for parameter in parameters.split(",\n"):
        if found := PARAMETER.fullmatch(parameter.strip()):
            kind = "Pointer" if found["mark"] == "*" else "Reference"
            full = f"{kind}<Space::{found['space']}, {found['const'] or ''}{found['type']}>"
            arguments.append(f'{full}(buffers[{found["index"]}], "{found["name"]}")')
            buffers.append(found["name"])
        elif (found := ATTRIBUTE.fullmatch(parameter.strip())) and found["name"] in ATTRIBUTES:
            arguments.append(ATTRIBUTES[found["name"]])
        else:
            raise KernelTextError(f"the emulator does not know the parameter `{parameter.strip()}`")
    return buffers, arguments
