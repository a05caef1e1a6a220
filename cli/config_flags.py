"""Flags of the serving configuration, one a field, made from the config classes themselves: name, type, choices, help."""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from ..common.config import (
    EngineConfig,
    FleetConfig,
    GatewayConfig,
    LogConfig,
    ModelConfig,
    ParallelConfig,
    ServeConfig,
    load_toml,
    parse,
)
from ..common.errors import ConfigError

_SECTIONS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "engine": EngineConfig,
    "parallel": ParallelConfig,
    "gateway": GatewayConfig,
    "fleet": FleetConfig,
    "log": LogConfig,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for every field but the model's name; what is not given stays None."""
    parser.add_argument(
        "--config", metavar="FILE", help="a TOML file with the sections model, engine, parallel, gateway, fleet, log; flags win"
    )
    for name in _SECTIONS:
        add_section(parser, name)


def add_section(
    parser: argparse.ArgumentParser,
    name: str,
    *,
    defaults: Mapping[str, object] | None = None,
    without: Collection[str] = (),
) -> None:
    """A flag for every field of one section, less those `without`; `defaults` are shown in place of the class's own."""
    section, defaults = _SECTIONS[name], defaults or {}
    group = parser.add_argument_group(f"[{name}]")
    hints = typing.get_type_hints(section)
    helps = _attribute_docs(section)
    for field in dataclasses.fields(section):
        if (name, field.name) != ("model", "model") and field.name not in without:
            default = defaults.get(field.name, field.default)
            _add_flag(group, field.name, hints[field.name], helps.get(field.name, ""), default)


def section_values(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The fields of a section whose flags were given."""
    fields = dataclasses.fields(_SECTIONS[name])
    return {field.name: value for field in fields if (value := getattr(args, field.name, None)) is not None}


def serve_config(args: argparse.Namespace) -> ServeConfig:
    """The file's sections with the flags over them.

    Raises:
        ConfigError: a key or value is wrong, or no model was named.
    """
    values: dict[str, Any] = load_toml(args.config) if args.config else {}
    for name in _SECTIONS:
        if given := section_values(args, name):
            values[name] = {**values.get(name, {}), **given}
    if "model" not in values.get("model", {}):
        raise ConfigError("which model? Name one, or give a --config file with [model] model = ...")
    return parse(ServeConfig, values)


def _add_flag(group: Any, name: str, hint: Any, text: str, default: Any) -> None:
    flag = f"--{name.replace('_', '-')}"
    text = f"{text} (default: {default})" if default is not None else text
    if hint is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif typing.get_origin(hint) is typing.Literal:
        group.add_argument(flag, choices=typing.get_args(hint), help=text)
    else:
        kinds = (
            [kind for kind in typing.get_args(hint) if kind is not type(None)] if isinstance(hint, types.UnionType) else [hint]
        )
        group.add_argument(flag, type=kinds[0], metavar={int: "N", float: "X", str: "TEXT"}[kinds[0]], help=text)


def _attribute_docs(section: type) -> dict[str, str]:
    """The Attributes block of a class's docstring: `name: text` or `name, other: text`, continued on deeper lines."""
    _, _, block = (section.__doc__ or "").partition("Attributes:")
    docs: dict[str, str] = {}
    for entry in re.findall(r"^ {8}(\w.*(?:\n {12}.*)*)", block, flags=re.MULTILINE):
        names, _, text = re.sub(r"\s+", " ", entry).partition(": ")
        docs.update(dict.fromkeys(names.split(", "), text.rstrip(".").replace("%", "%%")))
    return docs
