"""What every command does around its `main`: exit codes, one line for what went wrong, signals."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from data import outputs
from data.files import BadInput


def _on_uncaught(kind: type, error: BaseException, trace: Any) -> None:
    if kind is KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _on_uncaught  # also while a script imports torch: it imports this file before


def run_command(main: Callable[[], int | None], memory_flag: str = "--batch_size") -> int:
    """Run a command's `main` and return its exit code, with one line on stderr where it fails.

    0 done; 2 bad arguments or bad input (`BadInput`; a `ValueError`, which may be one of the code,
    with its place), or a file that cannot be read or written; 1 stopped by a guard, a closed pipe,
    out of memory (lower `memory_flag`) or a full disk; 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP. Streams
    that are closed read and write nothing; characters that stdout cannot hold are escaped.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed; a file that is opened takes its number
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
        elif hasattr(getattr(sys, name), "reconfigure"):
            bad = "replace" if name == "stdin" else "backslashreplace"
            with suppress(io.UnsupportedOperation):  # of stdin that was read before
                getattr(sys, name).reconfigure(errors=bad)
    leave = {n: lambda n, _: sys.exit(128 + n) for n in (signal.SIGTERM, signal.SIGHUP)}
    with suppress(ValueError):  # not in the main thread
        for number in leave:
            if signal.getsignal(number) == signal.SIG_DFL:  # not ignored, as under nohup
                signal.signal(number, leave[number])
    try:
        return main() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except ValueError as error:
        place = "" if isinstance(error, BadInput) else f" ({_raised_at(error)})"
        print(f"error: {_one_line(error)}{place}", file=sys.stderr)
        return 2
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = error.strerror or _one_line(error)
        reason = "the disk is full; free some space, and repeat the command" if full else reason
        print(f"error: {error.filename or 'a file or stdout'}: {reason}", file=sys.stderr)
        return 1 if full else 2
    except FloatingPointError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:  # torch raises its own as RuntimeErrors
        said = str(error).lower()
        known = isinstance(error, MemoryError) or "out of memory" in said
        if not known and "can't allocate" not in said:
            raise
        print(f"error: out of memory; lower {memory_flag}", file=sys.stderr)
        return 1
    finally:
        outputs.release()
        for number in leave:
            if signal.getsignal(number) is leave[number]:
                signal.signal(number, signal.SIG_DFL)


def printable(text: str) -> str:
    """Text of a file as a terminal may show it: what would move its cursor or turn its text around
    is escaped (\\x1b, \\r, \\u202e); lines and tabs stay."""
    controls = "[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]"
    return re.sub(controls, lambda found: ascii(found[0])[1:-1], text)


def _raised_at(error: Exception) -> str:
    """ "train_ppo.py:412": where, of an error that may be one of the code."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"


def _one_line(error: Exception) -> str:
    return " ".join(printable(str(error)).split())
