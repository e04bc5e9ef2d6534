"""One run of the command line: its surroundings, its errors and its exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress

import typer

from moe_lens.errors import MoeLensError, UsageError

from . import events, screen

DONE, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130

# The base of BadParameter is the error of a command line that does not parse, in a typer that
# uses click as well as in one that carries its own.
_ParseError: type[Exception] = typer.BadParameter.__bases__[0]


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the words after ``moe-lens``; see `moe_lens.cli.main`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or bool(os.environ.get("MOE_LENS_DEBUG"))
    words = [word for word in words if word != "--debug"] or ["--help"]
    as_json = "--json" in words
    _prepare(debug, as_json)
    try:
        code = _run(words, as_json=as_json, debug=debug)
        sys.stdout.flush()
        events.end(code)
    except BrokenPipeError:
        # Whoever read our output (head, less) has seen enough.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except SystemExit as ended:  # SIGTERM
        if as_json:
            events.end(int(ended.code or DONE), "terminated")
        raise
    return code


def _run(words: list[str], *, as_json: bool, debug: bool) -> int:
    from .app import app

    try:
        code = app(words, standalone_mode=False, prog_name="moe-lens")
    except _ParseError as error:
        return _report(_parse_message(error), BAD_USAGE, error, as_json, debug)
    except UsageError as error:
        return _report(str(error), BAD_USAGE, error, as_json, debug)
    except MoeLensError as error:
        return _report(str(error), FAILED, error, as_json, debug)
    except BrokenPipeError:
        raise
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        what = " ".join(str(error).split()) or "no message"
        message = f"internal error: {type(error).__name__}: {what}"
        if not debug:
            message += " (run it again with --debug for the traceback, and please report it)"
        return _report(message, FAILED, error, as_json, debug)
    if code == INTERRUPTED:  # what newer typer makes of Ctrl-C
        return _report("interrupted", INTERRUPTED, None, as_json, debug=False)
    return int(code or DONE)


def _report(
    message: str, code: int, error: BaseException | None, as_json: bool, debug: bool
) -> int:
    if debug and error is not None:
        screen.err().print("".join(traceback.format_exception(error)), markup=False)
    if as_json:
        content = {"error": message, "exit_code": code}
        evidence = getattr(error, "evidence", None)
        screen.emit_json(content | ({"evidence": evidence} if evidence else {}))
        events.end(code, message)
    elif code == INTERRUPTED:
        screen.interrupted()
    else:
        screen.error(message)
    return code


def _parse_message(error: Exception) -> str:
    """typer's sentence, with the command whose help says more."""
    message = error.format_message()  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "moe-lens"
    sentence = " ".join(str(message).split()).rstrip(".").replace("Value error, ", "")
    return f"{sentence} (see {command} --help)"


def _prepare(debug: bool, as_json: bool) -> None:
    """Show our own notes, and keep still what a user of the command line cannot act on."""
    for stream in (sys.stdout, sys.stderr):
        if (stream.encoding or "").lower().replace("-", "") != "utf8":
            with suppress(AttributeError):
                stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    screen.reset(as_json=as_json)
    events.reset()
    logger = logging.getLogger("moe_lens")
    logger.handlers[:] = [screen.NoteHandler()]
    logger.propagate = False
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for library in ("transformers", "huggingface_hub", "mlx_lm", "mlx", "tokenizers"):
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
