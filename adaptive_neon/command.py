"""A command: its signals, one line for what the user can mend, exit codes."""

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial

from .files import UserError, printable, unfailing_terminal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
KEPT = "stopped; finished parts are kept, the same command goes on"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{printable(message)} (see --help)")


def run_command(program: str, work: Callable[[list[str]], None], argv: list[str] | None) -> None:
    """work(options), where None are those of the command line. Whatever the user can mend is one
    line and exit code 2; a signal ends with a line and the code that shells report."""
    with signals_taken(program), unfailing_terminal():
        code = exit_code(program, work, sys.argv[1:] if argv is None else argv)
    if code:
        sys.exit(code)


def exit_code(program: str, work: Callable[[list[str]], None], argv: list[str]) -> int:
    try:
        work(argv)
    except UserError as error:
        complain(program, error)
        return 2
    except OSError as error:
        complain(program, f"{error}; what was finished stays")
        return 2
    except KeyboardInterrupt as stop:
        if not stop.args:  # not ours, which has said so
            complain(program, KEPT)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    return 0


def complain(program: str, message) -> None:
    print(f"{program}: {message}", file=sys.stderr)


def interrupt(program: str, number: int, frame) -> None:
    """One line at once: what runs may take minutes to notice."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{program}: {KEPT}\n".encode())
    raise KeyboardInterrupt(number)


@contextlib.contextmanager
def signals_taken(program: str) -> Iterator[None]:
    """Signals are the command's in this block, and the caller's again behind it."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other can catch them
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup, another language
                before[number] = signal.signal(number, partial(interrupt, program))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
