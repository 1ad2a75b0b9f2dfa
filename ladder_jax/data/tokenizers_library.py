"""The `tokenizers` library: what it raises, panics of Rust included, is one line."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

import tokenizers

from ladder_jax.config import ConfigError


@contextlib.contextmanager
def library_errors(message: str) -> Iterator[None]:
    """Turns an error of the tokenizers library into a ConfigError of one line.

    The library raises nothing narrower than Exception. A panic of its Rust code reaches
    Python as a PanicException, which is a BaseException.
    """
    try:
        yield
    except ConfigError:
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if not (is_panic or isinstance(error, Exception)):
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"{message}: {reason}") from None


@contextlib.contextmanager
def _drop_stderr_on_error() -> Iterator[None]:
    """Drops the output of its body to stderr if the body raises an exception.

    Rust writes the backtrace of a panic to the file descriptor before Python can catch
    the panic.
    """
    sys.stderr.flush()
    try:
        stderr = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    with tempfile.TemporaryFile() as output:
        os.dup2(output.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        output.seek(0)
        os.write(2, output.read())


def parse(text: str) -> tokenizers.Tokenizer:
    """Returns the library's tokenizer for the content of a tokenizer.json."""
    with (
        library_errors("this is not a Hugging Face tokenizer.json that can be read"),
        _drop_stderr_on_error(),
    ):
        library_tokenizer = tokenizers.Tokenizer.from_str(text)
    # Some files switch truncation and padding on.
    library_tokenizer.no_truncation()
    library_tokenizer.no_padding()
    # It makes the ids of a text random: in prompts, and in each process that tokenises.
    if getattr(library_tokenizer.model, "dropout", None) is not None:
        library_tokenizer.model.dropout = None
    return library_tokenizer
