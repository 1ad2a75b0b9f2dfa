"""A source of text at an object store: copied to this machine before it is read."""

import dataclasses

from ladder_jax import storage
from ladder_jax.addresses import is_address, local_path
from ladder_jax.config import Data
from ladder_jax.say import say


def with_local_source(data_config: Data) -> Data:
    """Returns the config with `data.source` as a path of this machine.

    A source at an address such as s3://bucket/folder is copied into the folder
    `data.token_cache`. Where the source is a path, only file:// is taken off it.

    Raises ConfigError and OSError as `storage.fetch_source` does; ConfigError where
    `data.token_cache` is an address.
    """
    cache = local_path(data_config.token_cache, "data.token_cache")
    source = data_config.source
    if is_address(source):
        folder = cache / "sources"
        source = storage.fetch_source(source, "data.source", folder, say)
    elif source.startswith("file://"):
        source = str(local_path(source, "data.source"))
    return dataclasses.replace(data_config, source=source)
