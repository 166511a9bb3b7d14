"""Keep standard output from ending a command with a traceback: characters that it has not, a full disk behind it."""

from __future__ import annotations

import io
import os
import sys

from hecompile.errors import InputError
from hecompile.files import reason_of


class _Output(io.TextIOWrapper):
    """Write text as standard output does, and report what it does not take as an error of the command line."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise self._refused(error) from None

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> Exception:
        # What is left goes nowhere: the interpreter would try once more at its end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if isinstance(error, BrokenPipeError):
            return error  # a reader who has gone is no error of ours
        return InputError(f"cannot write to standard output: {reason_of(error)}")


def prepare_output() -> None:
    """Make standard output and error safe for any text, and for a device that takes no more.

    A character that the encoding has not is written as an escape, `\\xe9` for é in ASCII.
    """
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")
    if type(sys.stdout) is io.TextIOWrapper:
        encoding, lines, through = sys.stdout.encoding, sys.stdout.line_buffering, sys.stdout.write_through
        sys.stdout = _Output(sys.stdout.detach(), encoding, "backslashreplace", None, lines, through)
