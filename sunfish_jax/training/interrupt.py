"""Stopping a run from outside without losing work: Ctrl-C, SIGTERM, and a terminal that closes."""

import contextlib
import math
import os
import signal
import sys
import threading
import time

# A closed terminal sends SIGHUP, unless the process was told to ignore it (`nohup`). Windows has none.
_HANG_UP = getattr(signal, "SIGHUP", None)
# A signal so soon after another is the same one: a terminal sends it to all of its processes, and `uv run`, where
# it takes itself for the only one that got it, passes it on.
_SECONDS_OF_ONE_SIGNAL = 0.3


class StopRequest:
    """Within its `with` block the first SIGINT or SIGTERM only asks to stop; the second ends the process.

    A SIGHUP only asks, however often it comes: a shell sends its own beside the kernel's, and whoever ends the
    session a SIGTERM after it.

    The main thread spends most of its time inside compiled code, where Python runs no signal handler. So a
    thread of its own reads the signals, from the pipe into which Python's C handler writes their numbers.
    """

    def __init__(self):
        self._asked = threading.Event()

    def __bool__(self) -> bool:
        """Whether a stop was asked for."""
        return self._asked.is_set()

    def __enter__(self) -> "StopRequest":
        self._numbers = [signal.SIGINT, signal.SIGTERM]
        if _HANG_UP is not None and signal.getsignal(_HANG_UP) != signal.SIG_IGN:
            self._numbers.append(_HANG_UP)
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._thread = threading.Thread(target=self._watch, args=(read_end,), daemon=True)
        self._thread.start()
        self._old_wakeup = signal.set_wakeup_fd(self._write_end)
        # Python's handlers do nothing: they exist so that the signals neither end the process nor raise.
        self._old_handlers = {number: signal.signal(number, lambda *_: None) for number in self._numbers}
        return self

    def ask_without_output(self, *streams: int):
        """Asks to stop because nobody reads these streams any more; what goes to them from here on is lost."""
        self._asked.set()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in streams:
            os.dup2(nowhere, stream)

    def tell(self, message: str):
        """Says how the stop goes, on stderr: Ctrl-C ends the reader of stdout too, in `main.py ... | tee log`."""
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr, flush=True)

    def __exit__(self, *_):
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._write_end)  # ends the thread
        self._thread.join()

    def _watch(self, read_end: int):
        asked_at = -math.inf
        while number := os.read(read_end, 1):
            if number[0] not in self._numbers:
                continue
            if number[0] == _HANG_UP:
                self.ask_without_output(1, 2)
                continue
            if time.monotonic() - asked_at < _SECONDS_OF_ONE_SIGNAL:
                continue
            if asked_at > -math.inf:
                self.tell("\nended at once, without saving")
                os._exit(128 + number[0])
            self._asked.set()
            asked_at = time.monotonic()
            self.tell("\nstopping after this step (once more: end at once, without saving)")
        os.close(read_end)
