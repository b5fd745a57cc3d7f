"""What the tests of worker processes run in them; apart, so that a worker need not import pytest."""

import ctypes
import os
import signal
import sys
import time


def act(item):
    """Does what a (verb, value) item says; "return" gives the value back."""
    verb, value = item
    if verb == "sleep":
        time.sleep(value)
    if verb == "hang":  # inside C code, deaf to signals
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL})
        ctypes.CDLL(None).sleep(int(value))
    if verb == "exit":
        os._exit(value)
    if verb == "signal":
        os.kill(os.getpid(), value)
    if verb == "segfault":
        ctypes.string_at(0)
    if verb == "allocate":
        return len(bytearray(value))
    if verb == "raise":
        raise RuntimeError(f"of {value}\nand more")
    if verb == "pid":
        with open(value, "a") as f:
            f.write(f"{os.getpid()}\n")
        time.sleep(0.2)
    if verb == "modules":
        return sorted(name for name in value if name in sys.modules)
    return value


class Misbehave:
    """Measures files of a folder, but does to its worker what their names say; "hang 60.mp4" hangs for a minute."""

    def __init__(self, folder, limits):
        self.folder, self.limits = folder, limits

    def __call__(self, key):
        from data_pipelines.inspection import MeasureFile

        verb, _, value = key.removesuffix(".mp4").partition(" ")
        if value:
            act((verb, int(value)))
        return MeasureFile(self.folder, self.limits)(key)
