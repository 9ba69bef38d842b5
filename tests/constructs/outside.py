"""What reaches outside of the process, or is shared with others in it."""

from __future__ import annotations

import ctypes
import multiprocessing
import queue
import threading

from tests.constructs.base import Construct


class Queue(Construct):
    """queue.Queue"""

    attributes = False
    refused = r"the loss uses self\.losses, which only training may use"

    def start(self):
        self.losses = queue.Queue()

    def factor(self, batch):
        self.losses.put(int(batch[1].sum()))
        return 1 / (1 + 0.001 * self.losses.qsize())

    def seen(self):
        return self.losses.qsize()


class Simple(Construct):
    """queue.SimpleQueue"""

    attributes = False
    refused = r"the loss uses self\.losses, which only training may use"

    def start(self):
        self.losses = queue.SimpleQueue()

    def factor(self, batch):
        self.losses.put(int(batch[1].sum()))
        return 1 / (1 + 0.001 * self.losses.qsize())

    def seen(self):
        return self.losses.qsize()


class Pipe(Construct):
    """a connection"""

    attributes = False
    refused = r"the loss uses self\.ends\[0\], which only training may use"

    def start(self):
        self.ends = multiprocessing.Pipe()

    def factor(self, batch):
        self.ends[0].send(float(batch[1].sum()))
        return 1 + 0.01 * self.ends[1].recv()

    def seen(self):
        return self.ends[1].poll()


class Locked:
    def __init__(self):
        self.lock = threading.Lock()
        self.total = 0.0

    def add(self, value):
        with self.lock:
            self.total += value
        return self.total


class Lock(Construct):
    """a meter with a lock"""

    attributes = False

    def start(self):
        self.meter = Locked()

    def factor(self, batch):
        return 1 / (1 + 0.001 * self.meter.add(float(batch[1].sum())))

    def seen(self):
        return self.meter.total


class ThreadLocal(Construct):
    """threading.local"""

    attributes = False

    def start(self):
        self.local = threading.local()
        self.local.steps = 0

    def factor(self, batch):
        self.local.steps += 1
        return 1 / (1 + 0.001 * self.local.steps)

    def seen(self):
        return self.local.steps


class SharedValue(Construct):
    """multiprocessing.Value and Array"""

    attributes = False

    def start(self):
        self.steps = multiprocessing.Value("i", 0)
        self.scales = multiprocessing.Array("d", [1.0, 0.5])

    def factor(self, batch):
        self.steps.value += 1
        self.scales[0] *= 0.999
        return self.scales[0] / (1 + 0.001 * self.steps.value)

    def seen(self):
        return self.steps.value, list(self.scales)


class Shared:
    def __init__(self):
        self.steps = multiprocessing.Value("i", 0)
        self.calls = 0


class SharedInObject(Construct):
    """an object with a multiprocessing.Value"""

    attributes = False

    def start(self):
        self.meter = Shared()

    def factor(self, batch):
        self.meter.steps.value += 1
        self.meter.calls += 1
        return 1 / (1 + 0.001 * self.meter.steps.value + 0.001 * self.meter.calls)

    def seen(self):
        return self.meter.steps.value, self.meter.calls


class CType(Construct):
    """a number of ctypes"""

    attributes = False

    def start(self):
        self.scale = ctypes.c_double(1.0)

    def factor(self, batch):
        self.scale.value *= 0.999
        return self.scale.value

    def seen(self):
        return self.scale.value
