"""A time limit for programs that hang."""

import faulthandler
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def unless_stalled(seconds: int) -> Iterator[Callable[[], bool]]:
    """Ends the process with a traceback if nothing calls the yielded function for `seconds`.

    jaxlib 0.10 on two cores sometimes hangs when every leaf has its own decomposition, as in the
    textbook. More threads in XLA's pool prevent it: set `NPROC=4` in the environment.
    """

    def still_alive() -> bool:
        faulthandler.dump_traceback_later(seconds, exit=True)
        return True

    still_alive()
    try:
        yield still_alive
    finally:
        faulthandler.cancel_dump_traceback_later()
