"""Read the settings a dataset was built with from the dataset itself."""

from __future__ import annotations

from typing import Any

from lapilli.data.config import BuildConfig
from lapilli.data.errors import DataError
from lapilli.data.io.access import cannot_read, is_denied
from lapilli.data.io.remote_path import Output
from lapilli.data.io.typed_json import JsonError, as_type, from_json
from lapilli.data.io.whole_file import read_whole
from lapilli.data.renamed import BUILD_NAMES
from lapilli.data.shards.manifest import read_manifest
from lapilli.data.trust import Trust, require_readers

__all__ = ["CONFIG", "read_build_config"]

CONFIG = "config.json"  # the recipe that makes this dataset again


def read_build_config(dataset: Output, trust: Trust) -> BuildConfig:
    """The settings of a finished dataset.

    Args:
        dataset: Its folder or address.
        trust: What the command allows of what they ask for.

    Raises:
        DataError: No dataset, settings that are damaged, or a reader of their own that the command
            does not allow.
    """
    read_manifest(dataset)  # no dataset, no settings
    path = dataset / CONFIG
    try:
        found = from_json(read_whole(path), dict[str, Any])
        config = as_type(BUILD_NAMES.with_new_names(found), BuildConfig)
    except OSError as error:
        if is_denied(error):
            raise DataError(cannot_read(path, error)) from None
        raise DataError(f"{path}: missing; run the same preprocess again, to rewrite it") from None
    except JsonError as error:
        raise DataError(
            f"{path}: damaged ({error}); run the same preprocess again, to rewrite it"
        ) from None
    require_readers(config, trust, path)
    return config
