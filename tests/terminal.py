"""A pseudo-terminal whose output tests read."""

import contextlib
import fcntl
import os
import pty
import select
import struct
import termios
import threading
import time


def read_until(shown, expected, seconds=60.0):
    """The output up to and including ``expected``; an error after ``seconds`` without it."""
    text, end = "", time.monotonic() + seconds
    while expected not in text:
        assert time.monotonic() < end, (expected, text)
        text += shown()
    return text


@contextlib.contextmanager
def terminal():
    """Redirect standard error to a terminal; yield a function that returns the new output.

    A thread reads all the time, because a full terminal blocks whoever writes to it.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    over, lock, read = threading.Event(), threading.Lock(), bytearray()

    def take():
        with lock:
            while select.select([master], [], [], 0.0)[0]:
                read.extend(os.read(master, 2**16))

    def watch():
        while not over.wait(1e-3):
            take()

    def shown():
        screen.flush()
        take()
        with lock:
            text = read.decode()
            read.clear()
        return text

    reader = threading.Thread(target=watch, daemon=True)
    reader.start()
    try:
        with os.fdopen(slave, "w") as screen, contextlib.redirect_stderr(screen):
            try:
                yield shown
            finally:
                over.set()
                reader.join()
    finally:
        os.close(master)
