"""What Orbax prints: its progress reports, and the noise of a damaged checkpoint."""

import contextlib
import gc
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence


@contextlib.contextmanager
def _filtered(
    names: Sequence[str | None], passes: Callable[[logging.LogRecord], bool]
) -> Iterator[None]:
    """Drops the records of these loggers for which `passes` is false."""

    # A new function for each call: removeFilter then leaves other calls' filters alone.
    def filter_of_this_call(record: logging.LogRecord) -> bool:
        return passes(record)

    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(filter_of_this_call)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(filter_of_this_call)


def without_progress(
    failed: Callable[[Exception], object] | None = None,
) -> contextlib.AbstractContextManager[None]:
    """Drops Orbax's progress reports and its tracebacks of failures.

    The caller raises the failures itself.

    failed: gets the error of a save in the background at once. Where there are several
      processes, Orbax raises it only after it has waited for the others for minutes.
    """

    def passes(record: logging.LogRecord) -> bool:
        is_save = "async_checkpointer" in record.pathname
        if failed and is_save and record.levelno == logging.ERROR:
            error = record.exc_info[1] if record.exc_info else None
            if not isinstance(error, Exception):
                error = OSError(record.getMessage())
            failed(error)
        return "orbax" not in record.pathname or record.levelno == logging.WARNING

    return _filtered(["absl"], passes)


@contextlib.contextmanager
def silent(*failures: type[BaseException]) -> Iterator[None]:
    """Drops the many lines that Orbax prints about a read that fails or is interrupted.

    Orbax does not await its failed tasks. Python prints their errors when it collects
    them (`sys.unraisablehook`), so this function collects them while the hook is off.

    failures: what the body raises then.
    """
    hook, drop = sys.unraisablehook, lambda _: False
    with warnings.catch_warnings(), _filtered([None, "absl", "asyncio"], drop):
        warnings.simplefilter("ignore")
        sys.unraisablehook = drop
        try:
            yield
        except failures as error:
            error.__context__ = None  # the context refers to the tasks
            gc.collect()
            raise
        finally:
            sys.unraisablehook = hook
