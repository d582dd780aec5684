"""Signals ask a run to stop, and a second one ends it."""

import signal
import subprocess
import sys
import time

import pytest

# A main thread inside C code that a signal does not interrupt, as in a compiled training step: one call.
PROGRAM = """
import hashlib, sys
from sunfish_jax.training.interrupt import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[1]))
    print("asked" if stop else "not asked", flush=True)
"""


def start(iterations):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(iterations)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_only_asks(number):
    process = start(5_000_000)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "stopping after this step" in err and out == "asked\n"


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_asks_and_nothing_is_printed_to_it(tmp_path, ignored):
    asked = tmp_path / "asked"
    # As `nohup` starts it, or not: these tests too may have been.
    handler = "SIG_IGN" if ignored else "SIG_DFL"
    program = f"import signal; signal.signal(signal.SIGHUP, signal.{handler})" + PROGRAM
    program += f"open({str(asked)!r}, 'w').write(str(bool(stop)))"
    command = [sys.executable, "-c", program, "5000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert (out, asked.read_text()) == (("not asked\n", "False") if ignored else ("", "True"))


def test_no_signal_no_request():
    done = subprocess.run([sys.executable, "-c", PROGRAM, "1"], capture_output=True, text=True)
    assert done.stdout == "ready\nnot asked\n"


def test_second_signal_ends_at_once_even_inside_compiled_code():
    process = start(100_000_000)
    process.send_signal(signal.SIGINT)
    assert "stopping" in process.stderr.readline() + process.stderr.readline()
    time.sleep(0.4)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "without saving" in err
    assert time.monotonic() - began < 5


def test_the_first_signal_after_a_closed_terminal_only_asks_too(tmp_path):
    # As at the end of a session: the kernel's for the terminal, then that of whoever ends what is left.
    program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)" + PROGRAM
    program += f"open({str(tmp_path / 'asked')!r}, 'w').write(str(bool(stop)))"
    process = subprocess.Popen([sys.executable, "-c", program, "5000000"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for number in (signal.SIGHUP, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.4)
    process.communicate(timeout=20)
    assert process.returncode == 0 and (tmp_path / "asked").read_text() == "True"


@pytest.mark.parametrize("reader", ["stdout", "stderr"])
def test_a_reader_that_ctrl_c_ended_too_keeps_no_signal_from_being_heard(reader):
    # `main.py ... | tee log`, and with `2>&1`: the terminal sends its SIGINT to both.
    process = start(100_000_000)
    getattr(process, reader).close()
    process.send_signal(signal.SIGINT)
    if reader == "stdout":
        assert "stopping" in process.stderr.readline() + process.stderr.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


def test_a_signal_that_is_passed_on_counts_once():
    # As by `uv run` outside a terminal: the process gets it from whoever sent it to its group, and from uv.
    process = start(5_000_000)
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "asked\n") and err.count("stopping") == 1


def test_handlers_are_put_back():
    from sunfish_jax.training.interrupt import StopRequest

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        for _ in range(100):
            if stop:
                break
            time.sleep(0.01)
        assert stop
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert signal.set_wakeup_fd(-1) == -1
