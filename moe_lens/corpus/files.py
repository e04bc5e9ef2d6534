"""Reading the four forms of a corpus, with an error that names file, line and remedy.

The meaning of each form stands in `moe_lens.corpus.prompts`; this module only knows files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_lens.errors import MoeLensError, UsageError

from .prompts import Corpus, Prompt

__all__ = ["read_corpus"]

TEXT_FIELDS = ("text", "prompt", "messages")
JSONL_SUFFIXES = (".jsonl", ".ndjson")


def read_corpus(source: Corpus | str | os.PathLike[str]) -> Corpus:
    """Read a corpus from a path or from the bundled text; a `Corpus` is returned as it is.

    Args:
        source: Path of a text file, JSONL file or folder; ``"demo"`` or ``"demo:evaluation"``
            (write ``./demo`` for a folder of that name); or a `Corpus`.

    Raises:
        UsageError: There is no such file.
        MoeLensError: The file cannot be read as prompts. The message names the file, the line and
            the remedy.
    """
    if isinstance(source, Corpus):
        return source
    if source in ("demo", "demo:calibration", "demo:evaluation"):
        return _read_demo(str(source))
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise UsageError(
            f"there is no corpus {str(source)!r}; give a text file, a JSONL file, a folder of text "
            "files, or 'demo'"
        )
    if path.suffix.lower() in JSONL_SUFFIXES:
        return _read_jsonl(path, str(source))
    if path.suffix.lower() == ".json":
        raise UsageError(
            f"{path} is a JSON document, not JSONL; write one JSON object per line into a .jsonl "
            "file (for a list: jq -c '.[]' in.json > out.jsonl)"
        )
    return _read_lines(path)


def _read_demo(name: str) -> Corpus:
    from moe_lens import demo

    path = demo.evaluation_path() if name == "demo:evaluation" else demo.calibration_path()
    if not path.exists():
        raise MoeLensError(
            f"the bundled corpus {name!r} is missing from this installation; install moe-lens "
            "again, or make it with python -m moe_lens.demo.train"
        )
    return _read_jsonl(path, name)


def _read_lines(path: Path) -> Corpus:
    lines = _lines(_read_text(path))
    prompts = tuple(Prompt(text=line) for line in lines if line.strip())
    if not prompts:
        raise MoeLensError(f"{path} holds no prompt; write one prompt per line")
    # The last line ends in a newline, after which nothing is missing.
    blank = len(lines) - len(prompts) - (1 if lines[-1] == "" else 0)
    notes = (f"{blank} blank lines of {path} hold no prompt.",) if blank else ()
    return Corpus(name=str(path), prompts=prompts, notes=notes)


def _read_jsonl(path: Path, name: str) -> Corpus:
    lines = _lines(_read_text(path))
    prompts = tuple(
        _read_record(line, f"line {number} of {path}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    )
    if not prompts:
        raise MoeLensError(
            f'{path} is empty; write one JSON object per line, such as {{"text": "..."}}'
        )
    return Corpus(name=name, prompts=prompts)


def _read_folder(folder: Path) -> Corpus:
    prompts = []
    for path in _visible_files(folder):
        if path.suffix.lower() in JSONL_SUFFIXES:
            raise UsageError(
                f"{path} is a JSONL file inside a folder, where every file is one prompt; give "
                "that file itself as the corpus, or move it out of the folder"
            )
        label = path.parent.relative_to(folder).as_posix()
        prompts.append(Prompt(text=_read_text(path), label=None if label == "." else label))
    if not prompts:
        raise MoeLensError(
            f"the folder {folder} holds no files; put text files into it, each of them one prompt"
        )
    if not any((prompt.text or "").strip() for prompt in prompts):
        raise MoeLensError(f"all {len(prompts)} files in {folder} are empty; write text into them")
    return Corpus(name=str(folder), prompts=tuple(prompts))


def _visible_files(folder: Path) -> Iterator[Path]:
    """Files below ``folder`` in sorted order; hidden ones (.git, .DS_Store) are no text."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MoeLensError(f"{path} cannot be read: {error.strerror}") from error
    if b"\0" in data and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise MoeLensError(
            f"{path} is a binary file, not text; convert it to UTF-8 text or leave it out"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MoeLensError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} in line {line} does not decode; "
            "convert it, for example with iconv -f latin1 -t utf-8"
        ) from error


def _lines(text: str) -> list[str]:
    """Split at newlines only: str.splitlines also cuts at form feeds and U+2028 inside prompts."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def _read_record(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise MoeLensError(
            f"{where[0].upper()}{where[1:]} is not JSON ({reason}{column}); write one JSON object "
            "per line"
        ) from error
    if not isinstance(record, dict):
        raise MoeLensError(
            f"{where[0].upper()}{where[1:]} is not a JSON object; write one such as "
            '{"text": "...", "label": "..."}'
        )
    _refuse_lone_surrogates(record, where)
    label = _read_label(record, where)
    for name in TEXT_FIELDS:
        if record.get(name) is not None:
            return _read_field(name, record[name], label, where)
    fields = ", ".join(map(repr, record)) or "none"
    raise MoeLensError(
        f"{where[0].upper()}{where[1:]} has none of the fields text, prompt and messages (found: "
        f"{fields}); rename the field that holds the prompt"
    )


def _read_field(name: str, value: Any, label: str | None, where: str) -> Prompt:
    if name == "messages":
        return Prompt(text=None, messages=_read_messages(value, where), label=label)
    if not isinstance(value, str):
        raise MoeLensError(f"the field {name!r} in {where} is {_kind(value)}; it must be a string")
    return Prompt(text=value, label=label)


def _read_messages(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    well_formed = (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
    )
    if not well_formed:
        raise MoeLensError(
            f"the field 'messages' in {where} is not a list of messages; write it as "
            '[{"role": "user", "content": "..."}]'
        )
    return tuple(value)


def _read_label(record: dict[str, Any], where: str) -> str | None:
    label = record.get("label")
    if label is None or isinstance(label, str):
        return label
    if isinstance(label, int | float):
        return json.dumps(label)
    raise MoeLensError(f"the label in {where} is {_kind(label)}; it must be a string or a number")


def _kind(value: Any) -> str:
    """A JSON value's kind in words."""
    kinds = {bool: "true or false", dict: "an object", list: "a list", str: "a string"}
    return kinds.get(type(value), "a number")


def _refuse_lone_surrogates(record: dict[str, Any], where: str) -> None:
    """Half a character, as "\\ud83d" alone is: JSON allows it, no tokenizer can encode it."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise MoeLensError(
            f"the text in {where} holds half of a surrogate pair, which is no character; remove "
            "the lone \\ud8xx escape"
        ) from error
