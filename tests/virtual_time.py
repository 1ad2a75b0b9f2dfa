"""An event loop whose clock jumps to the next timer, so that sleeping takes no time.

The clock stands still while there is work, and while bytes are on their way between
sockets of this process. So times in a test are exact, however slow the machine is.
"""

import asyncio
import selectors


class _Selector(selectors.DefaultSelector):
    def __init__(self):
        super().__init__()
        self.now = 0.0

    def select(self, timeout=None):
        ready = super().select(0)
        if ready or timeout is not None and timeout <= 0:
            return ready
        # What a socket has sent may need a moment to arrive.
        ready = super().select(0.0005 if timeout is not None else None)
        if not ready:
            self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        super().__init__(_Selector())

    def time(self):
        return self._selector.now


def run(coroutine):
    """`asyncio.run` in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)
