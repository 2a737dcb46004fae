"""The config.json of checkpoints that we write: fields of the source plus their equivalents in transformers 5.

transformers 5 renames fields and drops the old names on saving. Earlier versions then silently fall back to defaults,
for example for the rotary base or the number of experts.
"""

from __future__ import annotations

import json
from typing import Any

# Fields of transformers that describe the saving or the location, not the model.
_NOT_OF_THE_MODEL = ("transformers_version", "_name_or_path", "name_or_path", "architectures", "auto_map")
_DTYPE_FIELDS = ("dtype", "torch_dtype")


def own_fields(raw: dict[str, Any], read: Any, config: Any) -> dict[str, Any]:
    """The part of a config.json that describes `config`: all of it, or the nested table of an extracted model.

    raw: the content of the file; read: the configuration that transformers reads from it; config: `read` or a part.
    """
    if config is read:
        return raw
    part = next((raw.get(name) for name in read.sub_configs if getattr(read, name, None) is config), None)
    return part if isinstance(part, dict) else {}


def merged_config(raw: dict[str, Any], config: Any) -> dict[str, Any]:
    """`config` as JSON, with the fields of `raw` unchanged unless `config` was changed after reading.

    Args:
        raw: the fields of the source's config.json, see `own_fields`; empty for a source that has none.
        config: the current configuration, of the class that reads `raw`.

    The result reads back as `config`. If old and new fields together would read back differently, the new fields that
    `raw` does not have are left out.
    """
    written = _json(config, use_diff=True)
    if not raw:
        return written
    current, kind = _json(config), type(config)
    own = _changed(raw, _json(_read(kind, raw)), current)
    own.setdefault("model_type", written["model_type"])
    for result in (_added(own, written), own):
        if _of_the_model(_json(_read(kind, result))) == _of_the_model(current):
            return result
    # A class may change its fields whenever it is built. Only the form that it writes is sure to read back.
    return written


def set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Set every dtype field of a config.json, of the model and of its parts, to `dtype`."""
    config["dtype"] = dtype
    _replace_dtypes(config, dtype)


def _replace_dtypes(config: dict[str, Any], dtype: str) -> None:
    for name, value in config.items():
        if name in _DTYPE_FIELDS and value is not None:
            config[name] = dtype
        elif isinstance(value, dict) and name.endswith("_config") and name != "quantization_config":
            _replace_dtypes(value, dtype)


def _read(kind: Any, fields: dict[str, Any]) -> Any:
    return kind.from_dict(json.loads(json.dumps(fields), object_hook=_special_float))


def _special_float(table: dict[str, Any]) -> Any:
    """Decode infinity and the like, which transformers 5 writes as a table because strict JSON cannot."""
    return float(table["__float__"]) if table.keys() == {"__float__"} else table


def _json(config: Any, *, use_diff: bool = False) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=use_diff))
    return fields


def _changed(raw: dict[str, Any], read: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """`raw` with the values that differ between `now` and `read`, and without the fields missing from `now`."""
    result = {name: value for name, value in raw.items() if name not in read or name in now}
    for name, value in now.items():
        if name in _NOT_OF_THE_MODEL or (name in read and read[name] == value):
            continue
        before, part = read.get(name), raw.get(name)
        if isinstance(value, dict) and isinstance(before, dict) and isinstance(part, dict):
            result[name] = _changed(part, before, value)
        else:
            result[name] = value
    return result


def _added(own: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """`own` plus the fields that only `written` has, also in nested tables."""
    result = dict(own)
    for name, value in written.items():
        if name in _NOT_OF_THE_MODEL:
            continue
        if name not in own:
            result[name] = value
        elif isinstance(value, dict) and isinstance(own[name], dict):
            result[name] = _added(own[name], value)
    return result


def _of_the_model(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _NOT_OF_THE_MODEL}
