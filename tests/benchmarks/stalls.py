"""What ends a program that sits still."""

import faulthandler
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def unless_stalled(seconds: int) -> Iterator[Callable[[], bool]]:
    """Ends the process, with its stacks, where what this gives has not been called for so long.

    jaxlib 0.10 on two cores hangs now and then when every leaf has its own decomposition, as the
    textbook has. More threads in XLA's pool prevent it: `NPROC=4` in the environment.
    """

    def still_alive() -> bool:
        faulthandler.dump_traceback_later(seconds, exit=True)
        return True

    still_alive()
    try:
        yield still_alive
    finally:
        faulthandler.cancel_dump_traceback_later()
