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

from data import outputs
from data.files import BadInput


def _quiet_imports() -> None:
    """Let Ctrl-C end a script of this project without a word until `run_command` has begun: it
    imports torch for seconds, and some libraries make other errors of a KeyboardInterrupt."""
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "-").resolve()
    ours = script.is_relative_to(Path(__file__).resolve().parents[1]) and script.suffix == ".py"
    ours = ours and "site-packages" not in script.parts
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


with suppress(ValueError):  # not in the main thread
    _quiet_imports()  # scripts import this file before torch, see pyproject.toml


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
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, signal.default_int_handler)
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
