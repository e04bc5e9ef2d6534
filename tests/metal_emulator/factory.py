"""Stand-ins for ``mx.fast.metal_kernel`` and ``mx.fast.cuda_kernel`` that run on the CPU."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx

from .arrays import input_buffers, output_buffer, to_mlx
from .child import Buffer, Child, Launch, Order, Outcome, Output
from .compiling import kernel_library
from .cuda_text import cuda_text
from .cuda_text import translate as translate_cuda
from .errors import KernelFaultError
from .metal_text import Program
from .metal_text import translate as translate_metal
from .recording import KernelText, record_metal

Template = Sequence[tuple[str, mx.Dtype | int | bool]]


@functools.cache
def _child(sanitize: bool) -> Child:
    return Child(sanitize=sanitize)


@functools.lru_cache(maxsize=512)
def _metal_program(text: KernelText) -> Program:
    return translate_metal(text)


@functools.lru_cache(maxsize=512)
def _cuda_program(text: KernelText) -> Program:
    return translate_cuda(text)


def _quoted(message: str, text: KernelText) -> str:
    """The lines of `text` that `message` speaks of."""
    lines = text.source.splitlines()
    named = sorted({int(number) for number in re.findall(r"\bline (\d+)", message)})
    return "".join(f"\n{n:5}: {lines[n - 1].strip()}" for n in named if 1 <= n <= len(lines))


class EmulatedKernel:
    """What both factories return: called as MLX's kernels are, evaluated at once.

    After a call `text` is the generated text and `outcome` what the launch counted.
    """

    def __init__(
        self,
        input_names: Sequence[str],
        output_names: Sequence[str],
        text_of: Callable[..., KernelText],
        program_of: Callable[[KernelText], Program],
        *,
        whole_groups: bool,
        single_constants: bool,
        order: Order,
        seed: int,
        sanitize: bool,
        allow_unwritten: bool,
    ) -> None:
        self.input_names = tuple(input_names)
        self.output_names = tuple(output_names)
        self.text: KernelText | None = None
        self.outcome: Outcome | None = None
        self._text_of = text_of
        self._program_of = program_of
        self._whole_groups = whole_groups
        self._single_constants = single_constants
        self._order = order
        self._seed = seed
        self._sanitize = sanitize
        self._allow_unwritten = allow_unwritten

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array | float | int | bool],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Template | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: object = None,
    ) -> list[mx.array]:
        """Runs the kernel.

        Args:
            inputs: One array or scalar per input name.
            output_shapes: One shape per output name.
            output_dtypes: One dtype per output name.
            grid: Threads along x, y and z.
            threadgroup: Threads of one threadgroup along x, y and z; at most 1024 in all.
            template: Names and values compiled into the text.
            init_value: What outputs are filled with; None leaves them uninitialised.
            verbose: Taken for the sake of the signature; `text` holds the text.
            stream: Taken for the sake of the signature.

        Returns:
            The outputs.

        Raises:
            KernelTextError: Where the text is not valid.
            KernelFaultError: Where the launch went wrong.
        """
        given = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]
        call: dict[str, Any] = {
            "output_shapes": [tuple(shape) for shape in output_shapes],
            "output_dtypes": list(output_dtypes),
            "grid": tuple(grid),
            "threadgroup": tuple(threadgroup),
        }
        if template:
            call["template"] = list(template)
        if init_value is not None:
            call["init_value"] = init_value
        self.text = self._text_of(given, **call)
        program = self._program_of(self.text)
        library = kernel_library(
            program.source,
            sanitize=self._sanitize,
            single_constants=self._single_constants,
            zeroed=self._order != "forward",
        )
        known: dict[str, Buffer] = {}
        for name, array in zip(self.input_names, given, strict=True):
            known |= input_buffers(name, array)
        shapes = call["output_shapes"]
        for name, shape, dtype in zip(self.output_names, shapes, output_dtypes, strict=True):
            known[name] = output_buffer(name, shape, dtype, init_value)
        launch = Launch(
            library, call["grid"], call["threadgroup"], self._whole_groups, self._order, self._seed
        )
        try:
            self.outcome = _child(self._sanitize).run(launch, [known[n] for n in program.buffers])
        except KernelFaultError as fault:
            raise KernelFaultError(str(fault) + _quoted(str(fault), self.text)) from None
        for name, output in zip(self.output_names, self.outcome.outputs, strict=True):
            self._check_written(name, output)
        return [
            to_mlx(output, shape, dtype)
            for output, shape, dtype in zip(
                self.outcome.outputs, shapes, output_dtypes, strict=True
            )
        ]

    def _check_written(self, name: str, output: Output) -> None:
        if output.unwritten and not self._allow_unwritten:
            raise KernelFaultError(
                f"{output.unwritten} elements of the output {name} were never written, first "
                f"{name}[{output.first_unwritten}]: a GPU leaves there what the memory held before"
            )


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: object | None = None,
    *,
    order: Order = "forward",
    seed: int = 0,
    sanitize: bool = False,
    allow_unwritten: bool = False,
) -> EmulatedKernel:
    """Drop-in for ``mx.fast.metal_kernel``: MLX generates the text, the CPU runs it.

    Args:
        name: As in MLX, like the six that follow.
        input_names: Parameter names of the inputs.
        output_names: Parameter names of the outputs.
        source: The body of the kernel.
        header: Text before the kernel.
        ensure_row_contiguous: Must stay True: the emulator lays inputs out in rows.
        atomic_outputs: Whether outputs are ``device atomic<T>*``.
        compile_options: Handed to MLX; it has no effect here.
        order: In which order threads run and reductions add. In another than ``"forward"``
            variables start as 0, not as a pattern: what uses one too early shows.
        seed: Of the order ``"random"``.
        sanitize: Build with the address and undefined-behaviour sanitizers: finds accesses
            outside thread-local arrays, and costs compile and run time.
        allow_unwritten: Give unwritten elements their poison, 0xA5 in every byte, in place of a
            `KernelFaultError`.
    """
    if not ensure_row_contiguous:
        raise ValueError("the emulator lays inputs out in rows; leave ensure_row_contiguous True")
    made = mx.fast.metal_kernel(
        name, input_names, output_names, source, header, True, atomic_outputs, compile_options
    )
    real = cast("Callable[..., list[mx.array]]", made)

    def text_of(inputs: Sequence[mx.array], **call: Any) -> KernelText:
        return record_metal(real, inputs, **call)

    return EmulatedKernel(
        input_names,
        output_names,
        text_of,
        _metal_program,
        whole_groups=False,
        single_constants=True,
        order=order,
        seed=seed,
        sanitize=sanitize,
        allow_unwritten=allow_unwritten,
    )


def cuda_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    shared_memory: int = 0,
    *,
    order: Order = "forward",
    seed: int = 0,
    sanitize: bool = False,
    allow_unwritten: bool = False,
) -> EmulatedKernel:
    """Drop-in for ``mx.fast.cuda_kernel``: the text as MLX's CUDA backend builds it.

    MLX generates CUDA text only where it has that backend, so cuda_text.py builds it by the same
    rules. Arguments as in `metal_kernel`; `shared_memory` must stay 0, since dynamic shared
    memory has no counterpart in ``mx.fast.metal_kernel``.
    """
    if not ensure_row_contiguous:
        raise ValueError("the emulator lays inputs out in rows; leave ensure_row_contiguous True")
    if shared_memory:
        raise ValueError("the emulator has no dynamic shared memory; declare a __shared__ array")

    def text_of(inputs: Sequence[mx.array], **call: Any) -> KernelText:
        return cuda_text(
            name,
            dict(zip(input_names, inputs, strict=True)),
            dict(zip(output_names, call["output_dtypes"], strict=True)),
            source,
            header,
            call.get("template", ()),
        )

    return EmulatedKernel(
        input_names,
        output_names,
        text_of,
        _cuda_program,
        whole_groups=True,
        single_constants=False,
        order=order,
        seed=seed,
        sanitize=sanitize,
        allow_unwritten=allow_unwritten,
    )
