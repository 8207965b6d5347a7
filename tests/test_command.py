"""adaptive_neon.command: what both scripts do around their work."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from tqdm import tqdm

from adaptive_neon import command
from adaptive_neon.files import UserError

ROOT = Path(command.__file__).parent.parent


def code_of(work, argv=()):
    """The exit code of a command."""
    try:
        command.run_command("prog", work, argv)
    except SystemExit as stop:
        return stop.code
    return 0


def ending(error):
    def work(argv):
        raise error

    return work


def test_options_are_those_given_or_of_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog", "--from", "here"])
    seen = []
    command.run_command("prog", seen.append, None)
    command.run_command("prog", seen.append, [])
    command.run_command("prog", seen.append, ["--given"])
    assert seen == [["--from", "here"], [], ["--given"]]


def test_a_run_that_ends_well_has_no_exit_code():
    assert command.run_command("prog", lambda argv: None, []) is None


@pytest.mark.parametrize(
    "error, code, words",
    [
        (UserError("a wrong file"), 2, "a wrong file"),
        (OSError(28, "No space left on device"), 2, "No space left on device; what was finished"),
        (KeyboardInterrupt(), 130, "the same command goes on"),
    ],
    ids=["user", "disk", "stopped"],
)
def test_errors_are_one_line_and_a_code(capsys, error, code, words):
    assert code_of(ending(error)) == code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("prog: ") and words in line


def test_faults_of_ours_are_traced_back():
    with pytest.raises(NameError):
        code_of(ending(NameError("a fault of ours")))


@pytest.mark.parametrize("argv", [["--nonsense"], ["--number", "x"]], ids=" ".join)
def test_wrong_options_are_errors_of_the_user(argv):
    parser = command.Parser()
    parser.add_argument("--number", type=int)
    with pytest.raises(UserError, match=r"\(see --help\)"):
        parser.parse_args(argv)


# -------------------- signals


@pytest.fixture(autouse=True)
def signals():
    """Python's own handlers, also where the tests run in the background of a shell, whose children
    ignore SIGINT."""
    handlers = {number: signal.getsignal(number) for number in command.SIGNALS}
    for number in handlers:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_answered_at_once_and_end_the_command(capfd, number):
    """One line before the interrupt reaches what runs, and the code that shells report."""
    said = []

    def work(argv):
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            said.append(capfd.readouterr().err)
            raise

    assert code_of(work) == 128 + number
    (line,) = said[0].strip().splitlines()
    assert line == "prog: stopped; finished parts are kept, the same command goes on"
    assert capfd.readouterr().err == ""  # it is said once


@pytest.mark.parametrize("end", [None, UserError("any"), NameError("any")])
def test_signals_are_the_callers_again(end):
    """One that is ignored, as nohup asks for, stays so in between."""
    kept = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = [signal.getsignal(number) for number in command.SIGNALS]
    during = []

    def work(argv):
        during.extend(signal.getsignal(number) for number in command.SIGNALS)
        if end:
            raise end

    with contextlib.suppress(NameError):
        code_of(work)
    assert [signal.getsignal(number) for number in command.SIGNALS] == before
    assert [getattr(handler, "func", handler) for handler in during] == [
        command.interrupt,
        command.interrupt,
        signal.SIG_IGN,
    ]
    signal.signal(signal.SIGHUP, kept)


def test_in_a_thread_where_signals_cannot_be_caught():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(code_of(lambda argv: None)))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.parametrize("script", ["edm_neon.py", "toy_neon.py"])
@pytest.mark.parametrize("handler, code", [(signal.SIG_DFL, 130), (signal.SIG_IGN, 7)])
def test_ctrl_c_while_imports_run(tmp_path, script, handler, code):
    """No traceback; and nothing where it is ignored, as in the background of a script."""
    raised = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit(7)\n"
    (tmp_path / "numpy.py").write_text(raised)
    done = subprocess.run(
        [sys.executable, str(ROOT / script)],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
        stderr=subprocess.PIPE,
    )
    assert (done.returncode, done.stderr) == (code, b"")


# -------------------- terminals


def gone():
    """A terminal whose reader has left."""
    read, write = os.pipe()
    os.close(read)
    return open(write, "w", buffering=1)


def without_accents():
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", line_buffering=True)


TERMINALS = [gone, without_accents, partial(open, "/dev/full", "w"), lambda: None]


@pytest.mark.parametrize("terminal", TERMINALS, ids=["gone", "ascii", "full", "none"])
def test_a_terminal_that_fails_costs_nothing(terminal, monkeypatch):
    """Work goes to its end, whatever was said on the way."""
    done = []

    def work(argv):
        print("Grüße", flush=True)
        for _ in tqdm(range(2), desc="Fréchet"):
            print("and what follows", flush=True)
        for _ in tqdm(range(2), disable=None):
            done.append("all")

    one, other = terminal(), terminal()
    monkeypatch.setattr(sys, "stdout", one)
    monkeypatch.setattr(sys, "stderr", other)
    assert code_of(work) == 0 and len(done) == 2
    assert (sys.stdout, sys.stderr) == (one, other)
    for stream in filter(None, (one, other)):
        with contextlib.suppress(OSError):  # of what is left in it
            stream.close()
