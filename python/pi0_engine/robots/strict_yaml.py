"""YAML as robots are declared in: safe, and a repeated key is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: Path) -> Any:
    """What a YAML or JSON file holds. Raises ValueError with the file's name."""
    try:
        return yaml.load(path.read_text(), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


class _StrictLoader(yaml.SafeLoader):
    """YAML (of which JSON is a part) in which a repeated key is an error."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    plain = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    keys = [loader.construct_object(key, deep=True) for key in plain]
    repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
    if repeated:
        raise yaml.constructor.ConstructorError(None, None, f"repeated keys {repeated}", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
