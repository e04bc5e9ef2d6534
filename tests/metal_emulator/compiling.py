"""Compiles the child process and the kernels, each once per text.

Results lie in a folder of the temporary directory under a hash of text, headers, compiler and
flags, so a second run of the tests compiles nothing. ``METAL_EMULATOR_CACHE`` names another one.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .errors import KernelTextError, NoCompilerError

HERE = Path(__file__).parent
REMEDY = "install g++ (Debian: apt-get install g++) or set CXX to a C++17 compiler"

COMMON = ("-std=c++17", "-g1", "-fno-omit-frame-pointer", "-U_FORTIFY_SOURCE")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DEMULATOR_SANITIZED")
# No inlining: every call then has one place in the code, which is how two calls of a helper are
# told apart; and it compiles fastest. Uninitialised variables hold a pattern, never a lucky zero.
KERNEL = (
    "-O0",
    "-shared",
    "-fPIC",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-attributes",
    "-Wno-unknown-attributes",
    "-Wno-unused",
    "-Werror=return-type",
    "-Werror=uninitialized",
    "-Werror=double-promotion",
)
# Taken where the compiler knows them: the pattern since GCC 12, reading 1.0 as a float in GCC
# alone (elsewhere a kernel with such a constant is refused by -Wdouble-promotion).
PATTERN = "-ftrivial-auto-var-init=pattern"
ZERO = "-ftrivial-auto-var-init=zero"
SINGLE_CONSTANTS = "-fsingle-precision-constant"


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the `command` that calls it and the `version` it reports."""

    command: tuple[str, ...]
    version: str

    def takes(self, flag: str) -> bool:
        """Whether the compiler knows `flag`."""
        command = [*self.command, "-Werror", flag, "-fsyntax-only", "-xc++", "-"]
        return subprocess.run(command, input=b"", capture_output=True).returncode == 0


@functools.cache
def _known(flags: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(flag for flag in flags if find_compiler().takes(flag))


@functools.cache
def find_compiler() -> Compiler:
    """``CXX``, else g++, c++ or clang++.

    Raises:
        NoCompilerError: Where there is none, with the remedy.
    """
    wanted = os.environ.get("CXX")
    for candidate in [wanted] if wanted else ["g++", "c++", "clang++"]:
        command = tuple(shlex.split(candidate))
        if command and shutil.which(command[0]):
            told = subprocess.run([*command, "--version"], capture_output=True, text=True)
            if told.returncode == 0:
                return Compiler(command, told.stdout.splitlines()[0])
    raise NoCompilerError(f"the emulator of GPU kernels needs a C++ compiler: {REMEDY}")


def cache_folder() -> Path:
    """Where compiled kernels are kept; made where it is missing, for this user alone."""
    named = os.environ.get("METAL_EMULATOR_CACHE")
    default = Path(tempfile.gettempdir()) / f"metal-emulator-{os.getuid()}"
    folder = Path(named) if named else default
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(
            f"{folder} belongs to another user; let METAL_EMULATOR_CACHE name a folder of yours"
        )
    return folder


@functools.cache
def _headers() -> str:
    return "".join(path.read_text() for path in sorted(HERE.glob("*.h")))


def _compile(source: str, flags: tuple[str, ...], what: str) -> Path:
    compiler = find_compiler()
    key = "\0".join([source, _headers(), *compiler.command, compiler.version, *flags])
    built = cache_folder() / hashlib.sha256(key.encode()).hexdigest()[:24]
    if built.exists():
        return built
    # A second process may compile the same text; the last rename wins, and both are whole.
    with tempfile.TemporaryDirectory(dir=built.parent) as work:
        code, target = Path(work, "text.cpp"), Path(work, "built")
        code.write_text(source)
        command = [*compiler.command, *flags, f"-I{HERE}", str(code), "-o", str(target)]
        if "-shared" not in flags:
            command.append("-ldl")
        told = subprocess.run(command, capture_output=True, text=True)
        if told.returncode:
            raise KernelTextError(f"{compiler.version} rejects {what}:\n{told.stderr[:6000]}")
        os.replace(target, built)
    return built


def kernel_library(
    source: str, *, sanitize: bool, single_constants: bool = False, zeroed: bool = False
) -> Path:
    """The shared library of one kernel.

    Args:
        source: C++ that defines ``kernel_entry`` (see runtime.h).
        sanitize: Whether the address and undefined-behaviour sanitizers are built in.
        single_constants: Whether ``1.0`` is a float, as in Metal, or a double, as in CUDA.
        zeroed: Whether variables start as 0. Else they start as a pattern, which GCC makes of
            bytes 0xFE: as a float it is below any logit, so it may pass for minus infinity.

    Raises:
        KernelTextError: Where the compiler refuses the text, with what it says.
        NoCompilerError: Where there is no compiler.
    """
    start = ZERO if zeroed else PATTERN
    optional = (start, SINGLE_CONSTANTS) if single_constants else (start,)
    flags = [*COMMON, *KERNEL, *_known(optional)]
    if sys.platform == "darwin":
        flags += ["-undefined", "dynamic_lookup"]
    if sanitize:
        flags += SANITIZERS
    return _compile(source, tuple(flags), "the kernel")


def runner(*, sanitize: bool) -> Path:
    """The child process that loads kernel libraries and runs them."""
    flags = [*COMMON, "-O2", "-rdynamic", *(SANITIZERS if sanitize else ())]
    if sys.platform == "darwin":
        flags += ["-D_XOPEN_SOURCE=700", "-D_DARWIN_C_SOURCE"]  # for makecontext
    return _compile((HERE / "runner.cpp").read_text(), tuple(flags), "the emulator's own runner")
