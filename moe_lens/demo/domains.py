"""The six text domains of the demo model, made from what every Python installation holds.

``prose`` and ``code`` come from the standard library of the running interpreter; the other four
domains are generated (see :mod:`moe_lens.demo.generated`). A hash of each text's own key decides
once and for all whether it is for training, calibration or evaluation, so no text can ever be on
two sides, whichever machine or seed builds the corpus.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

from moe_lens.demo import generated

Split = Literal["train", "calibration", "evaluation"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "evaluation")

SHARES: dict[str, float] = {
    "prose": 0.20,
    "code": 0.20,
    "math": 0.22,
    "strings": 0.14,
    "json": 0.12,
    "html": 0.12,
}
"""Share of the training windows per domain. Arithmetic is only learned with a share this high."""

DOMAINS: tuple[str, ...] = tuple(SHARES)

_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",  # byte tables, not code
        "idlelib",
        "lib2to3",
        "pydoc_data",  # the prose domain reads it on its own
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)

Documents = dict[Split, list[str]]
"""Texts of one domain by split."""


def split_of(key: str) -> Split:
    """The split a text belongs to: 14 of 16 hash values train, one calibrates, one evaluates.

    ``key`` names the text for good: a file path, a documentation topic, a sum, or the text itself.
    """
    value = hashlib.sha256(key.encode()).digest()[0] % 16
    if value == 0:
        return "calibration"
    return "evaluation" if value == 1 else "train"


@dataclass
class Corpus:
    """All documents, ``documents[domain][split]``, and where the natural text came from."""

    documents: dict[str, Documents] = field(default_factory=dict)

    def texts(self, domain: str, split: Split) -> list[str]:
        """The documents of one domain and split."""
        return self.documents[domain][split]


def build_corpus(seed: int = 0) -> Corpus:
    """Read the standard library, generate the rest; the same seed gives the same corpus."""
    corpus = Corpus()
    prose, code = _standard_library()
    corpus.documents["prose"] = prose
    corpus.documents["code"] = code
    makers: dict[str, Callable[[int], Iterator[tuple[str, str]]]] = {
        "math": generated.math_lines,
        "strings": generated.string_lines,
        "json": generated.json_documents,
        "html": generated.html_documents,
    }
    for domain, make in makers.items():
        texts: Documents = {split: [] for split in SPLITS}
        for key, text in make(seed):
            texts[split_of(key)].append(text)
        if domain in ("math", "strings"):
            # One line is far shorter than a training window, so lines are gathered into pages.
            texts = {split: _pages(lines) for split, lines in texts.items()}
        corpus.documents[domain] = texts
    return corpus


def library_files() -> list[tuple[str, Path]]:
    """Standard library modules, ``(name relative to the library, path)``, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        parts = set(relative.parts[:-1])
        # Debian and others put the build configuration into folders called config-3.x-...
        if parts & _SKIPPED_FOLDERS or any(part.startswith("config-") for part in parts):
            continue
        if relative.name.startswith("_sysconfigdata"):
            continue  # machine-dependent build settings
        found.append((relative.as_posix(), path))
    return sorted(found)


def _standard_library() -> tuple[Documents, Documents]:
    """Prose (documentation topics and docstrings) and code (modules without docstrings).

    Both halves of a module share the split of its path: a docstring of a held-out module is
    held-out prose, and the code it describes is held-out code.
    """
    prose: Documents = {split: [] for split in SPLITS}
    code: Documents = {split: [] for split in SPLITS}
    for topic in sorted(topics):
        prose[split_of(f"topic:{topic}")].append(topics[topic].strip() + "\n")
    seen: set[str] = set()
    for name, path in library_files():
        try:
            source = path.read_text(encoding="utf-8")
            docstrings, body = separate_docstrings(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        fresh = [text for text in docstrings if len(text) > 40 and text not in seen]
        seen.update(fresh)
        split = split_of(f"module:{name}")
        if fresh:
            prose[split].append("\n\n".join(fresh) + "\n")
        if len(body) > 200:
            code[split].append(body)
    return prose, code


def separate_docstrings(source: str) -> tuple[list[str], str]:
    """Take the docstrings out of a module: their cleaned texts, and the source without them."""
    tree = ast.parse(source)
    lines = source.splitlines()
    docstrings: list[str] = []
    removed: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node)
        if text is None:
            continue
        docstrings.append(text)
        statement = node.body[0]
        removed.update(range(statement.lineno - 1, statement.end_lineno or statement.lineno))
    kept = [line.rstrip() for number, line in enumerate(lines) if number not in removed]
    return docstrings, "\n".join(kept).strip() + "\n"


def _pages(lines: list[str], lines_per_page: int = 64) -> list[str]:
    """Join lines into texts of ``lines_per_page`` lines each."""
    starts = range(0, len(lines), lines_per_page)
    return ["\n".join(lines[start : start + lines_per_page]) + "\n" for start in starts]
