"""A second opinion on a Metal text: clang parses it with real address spaces.

Apple's Metal compiler is a clang, so its front end is the nearest thing there is. Taken is the
``libclang`` wheel where it is installed, which needs no compiler, else ``clang++``.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from .errors import NoCompilerError
from .recording import KernelText

FLAGS = (
    "-xc++",
    "-std=c++17",
    "-nostdinc",
    "-ffreestanding",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wno-unknown-attributes",
    "-Wno-ignored-attributes",
)
HOST_NAME = re.compile(r"template \[\[host_name\(.*?\)\]\] \[\[kernel\]\] ")
REMEDY = "no clang here to lint Metal text: pip install libclang, or install clang"


def lint(text: KernelText) -> list[str]:
    """What clang finds wrong with `text`, one line each with its line number; empty: nothing.

    Raises:
        NoCompilerError: Where neither libclang nor clang++ is there.
    """
    declarations = Path(__file__).with_name("declarations.h").read_text()
    # clang knows no attributes of Metal behind `template`.
    code = declarations + HOST_NAME.sub("template ", text.source)
    before = declarations.count("\n")
    try:
        index = importlib.import_module("clang.cindex")
    except ImportError:
        found = _by_clang(code)
    else:
        found = _by_libclang(index, code)
    return [f"line {line - before}: {message}" for line, message in found]


def _by_libclang(index: Any, code: str) -> list[tuple[int, str]]:
    parsed = index.Index.create().parse("kernel.cpp", list(FLAGS), [("kernel.cpp", code)])
    return [
        (found.location.line, found.spelling)
        for found in parsed.diagnostics
        if found.severity >= index.Diagnostic.Error
    ]


def _by_clang(code: str) -> list[tuple[int, str]]:
    clang = shutil.which("clang++") or shutil.which("clang")
    if clang is None:
        raise NoCompilerError(REMEDY)
    told = subprocess.run(
        [clang, *FLAGS, "-fsyntax-only", "-"], input=code, capture_output=True, text=True
    )
    found = re.findall(r"^[^\n:]*:(\d+):\d+: (?:fatal )?error: (.*)$", told.stderr, re.M)
    if told.returncode and not found:
        raise RuntimeError(f"clang fails without an error line:\n{told.stderr[:2000]}")
    return [(int(line), message) for line, message in found]
