"""Paths of file systems, and addresses of object stores such as s3://bucket/folder.

What a job writes must be on a file system, since a run appends to files, renames them
and holds a lease: `local_path` refuses an address. `storage` reads from one.
"""

import errno
import os
import re
from pathlib import Path

from ladder_jax.checks import ConfigError, short_repr


def is_address(value: object) -> bool:
    """Whether a value is an address SCHEME://..., and not a path. file:// is a path."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", str(value))
    return scheme is not None and scheme[1].lower() != "file"


def local_path(value: str | os.PathLike[str], field: str) -> Path:
    """The path that `value` names: with ~, or as file:///folder.

    Raises ConfigError, which names `field`, where `value` is an address, or no file
    system can have a file of this name.
    """
    text = os.fspath(value)
    if is_address(text):
        raise ConfigError(
            f"{field}={text!r} is not accepted: it must be a path of a file system. "
            "Mount the bucket, or copy to it afterwards: see docs/storage.md"
        )
    try:
        path = Path(re.sub(r"^file://(localhost)?(?=/)", "", text)).expanduser()
        os.lstat(path)
    except (ValueError, RuntimeError) as error:  # a null byte; ~ of an unknown user
        raise ConfigError(
            f"{field}={short_repr(text)} is not accepted: {error}"
        ) from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(
                f"{field}={short_repr(text)} is not accepted: {error.strerror}"
            ) from None
    return path
