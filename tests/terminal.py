"""A terminal that a test looks at."""

import contextlib
import fcntl
import os
import pty
import select
import struct
import termios
import threading
import time


def read_until(shown, words, seconds=60.0):
    """What is ``shown`` until ``words`` are there; an error where they do not come."""
    text, end = "", time.monotonic() + seconds
    while words not in text:
        assert time.monotonic() < end, (words, text)
        text += shown()
    return text


@contextlib.contextmanager
def terminal():
    """A terminal as standard error, and a function that tells what was written to it since.

    It is read all the time: a terminal that nobody reads holds up who writes to it.
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
