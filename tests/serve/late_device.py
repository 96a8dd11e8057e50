"""A device that does nothing until somebody waits for it: what the order of streams and events does not say, breaks."""

import threading
from functools import partial

import torch

from prerank.serve.device_streams import CpuDevice


class Lost(RuntimeError):
    """The device is gone."""


class LateEvent:
    def __init__(self, stream, at):
        self.stream, self.at = stream, at

    def wait(self):
        self.stream.device.waits += 1
        self.stream.come_to(self.at)


class LateStream:
    """Work is kept until an event after it is waited for; what it follows is done then, and no sooner."""

    def __init__(self, device):
        self.device, self.steps, self.done = device, [], 0

    def do(self, work):
        self.steps.append(work)

    def follow(self, event):
        self.steps.append(partial(event.stream.come_to, event.at))

    def mark(self):
        return LateEvent(self, len(self.steps))

    def come_to(self, at):
        with self.device.lock, torch.inference_mode():
            while self.done < at:
                self.done += 1
                self.steps[self.done - 1]()
                self.steps[self.done - 1] = None


class LateGraph:
    def __init__(self, device, work):
        self.device, self.work = device, work

    def replay(self):
        if self.device.replay_error is not None:
            raise self.device.replay_error
        self.work()


class LatePool:
    def __init__(self, device):
        self.device, self.stream, self.num_bytes = device, LateStream(device), 0

    def capture(self, work):
        self.device.is_capturing.set()
        assert self.device.may_capture.wait(60)
        if self.device.capture_error is not None:
            raise self.device.capture_error
        self.num_bytes += 1000
        return LateGraph(self.device, work)


class LateDevice(CpuDevice):
    """`capture_error` and `replay_error` are raised while they are set; so much memory is `free`.

    A capture says that it `is_capturing`, and waits until it `may_capture`.
    """

    def __init__(self, lock, free=1 << 40, name="late"):
        super().__init__(name)
        self.lock, self.free = lock, free
        self.capture_error = self.replay_error = None
        self.waits = 0  # how often somebody waited
        self.may_capture, self.is_capturing = threading.Event(), threading.Event()
        self.may_capture.set()

    def stream(self):
        return LateStream(self)

    def pool(self):
        return LatePool(self)

    def free_bytes(self):
        return self.free

    def is_lost(self, error):
        return isinstance(error, Lost)
