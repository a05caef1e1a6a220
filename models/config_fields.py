"""The fields of a config.json as transformers completes them: older layouts translated, defaults filled in.

Importing transformers' configuration classes imports much of torch beside: it is half of the processor time that a worker's
start takes. So what they made of a file is kept, in $PILOTFISH_CACHE/configs (default ~/.cache/pilotfish/configs), under a name
that hashes the file, the version of transformers and this module. Files that transformers refuses are not kept.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConfigFields:
    """`values` of all fields, under each of their names; `changed` are those that the config's own class declares and whose
    value is neither null nor the default."""

    values: dict[str, Any]
    changed: list[str]


def read_fields(file: Path) -> ConfigFields:
    """Those of `file`, a checkpoint's config.json. Remote code is never run.

    Raises:
        OSError: `file` cannot be read.
        Exception: transformers refuses it; it raises classes of its own and of its libraries.
    """
    kept = _cache_directory() / f"{_key(file.read_bytes())}.json"
    try:
        return ConfigFields(**json.loads(kept.read_text(encoding="utf-8")))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s cannot be used (%s): it is written again", kept, error)
    text = json.dumps(asdict(_ask_transformers(file)))
    _keep(kept, text)
    return ConfigFields(**json.loads(text))


@cache
def transformers_version() -> str:
    return importlib.metadata.version("transformers")


def _ask_transformers(file: Path) -> ConfigFields:
    import transformers

    config = transformers.AutoConfig.from_pretrained(file.parent, trust_remote_code=False)
    values = config.to_dict() | {"is_heterogeneous": bool(getattr(config, "is_heterogeneous", False))}
    for other_name, name in config.attribute_map.items():
        values[other_name] = values.get(name)
    inherited = {field.name for field in fields(transformers.PreTrainedConfig)}
    own = [field for field in fields(config) if field.name not in inherited]
    changed = [field.name for field in own if getattr(config, field.name) not in (None, field.default)]
    return ConfigFields(values, changed)


def _cache_directory() -> Path:
    return Path(os.environ.get("PILOTFISH_CACHE") or "~/.cache/pilotfish").expanduser() / "configs"


def _key(content: bytes) -> str:
    parts = Path(__file__).read_bytes(), transformers_version().encode(), content
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]


def _keep(path: Path, text: str) -> None:
    """Processes may race: each writes a file of its own, and all have the same content."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="write-") as scratch:
            (written := Path(scratch) / path.name).write_text(text, encoding="utf-8")
            os.replace(written, path)
    except OSError as error:
        logger.warning("%s cannot be written (%s), so each start imports transformers: set PILOTFISH_CACHE", path, error)
