"""`pilotfish keys`: API keys of tenants."""

from __future__ import annotations

import argparse
import re
import secrets

from ..common.api_keys import ID_BYTES, SECRET_BYTES, hash_line, make_key
from ..common.errors import ConfigError
from ..common.tenants import ANONYMOUS_NAME


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    new = actions.add_parser("new", help="make a key, show it once, and say what to add to the configuration")
    new.add_argument("name", metavar="NAME", help="the tenant's name: letters, digits, '-' and '_'")
    new.add_argument("--operator", action="store_true", help="the key may also read status, metrics and the live page")


def run(args: argparse.Namespace) -> int:
    name = args.name
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) or name == ANONYMOUS_NAME:
        raise ConfigError(f"a tenant's name is 1 to 64 letters, digits, '-' or '_', and not {ANONYMOUS_NAME!r}; got {name!r}")
    key = make_key(secrets.token_bytes(ID_BYTES), secrets.token_bytes(SECRET_BYTES))
    print(
        f"API key of {name}, shown only now (give it to the client as PILOTFISH_API_KEY):\n  {key}\n"
        f"For the server's --config file, beside the tenant's other keys:\n"
        f'  [tenants.{name}]\n  keys = ["{hash_line(key)}"]' + ("\n  operator = true" if args.operator else "")
    )
    return 0
