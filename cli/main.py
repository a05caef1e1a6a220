"""The `pilotfish` command: one module a subcommand, loaded when it is used.

Exit codes: 0 it worked; 1 it failed, with the reason on stderr; 2 the command line was wrong; 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..common.errors import PilotfishError

COMMANDS = {
    "serve": "serve a model over gRPC and HTTP, in the foreground",
    "up": "serve a model on a running Ray cluster, and return when it serves",
    "rollout": "change the weights that 'pilotfish up' serves, a replica at a time",
    "down": "end what 'pilotfish up' started",
    "chat": "talk to a served model in the terminal",
    "generate": "continue one prompt, or each line of a file",
    "bench": "measure latency and throughput of an engine here, or of a running server",
    "keys": "make API keys, by which a server tells its tenants apart",
    "pull": "fetch a model by its alias into the cache",
    "check-model": "prove that a checkpoint runs right: logits and greedy tokens against transformers",
    "status": "show a running cluster: replicas, load, defaults",
    "explain": "say why the router sent a request where it went: every replica's cost, by parts",
    "replay": "run a trace of arrivals through the router, in virtual time and without a model",
    "env": "show what matters of this machine, and what to fix",
}


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line ends with one line that says how to get help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\nTry '{self.prog} --help'.\n")


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; only `command`'s own arguments are added, so that help and start are quick."""
    parser = _Parser(
        prog="pilotfish",
        description="Serve large language models on a Ray cluster of GPUs.",
        epilog="'pilotfish COMMAND --help' explains a command. Start with: pilotfish pull smollm2-135m && "
        "pilotfish serve smollm2-135m",
    )
    parser.add_argument("--version", action="version", version=f"pilotfish {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".", formatter_class=_HelpFormatter
        )
        if name == command:
            _module(name).add_arguments(subparser)
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown only where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, ()) or action.default == []:
            return action.help
        return super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    args = build_parser(command).parse_args(arguments)
    try:
        return int(_module(args.command).run(args))
    except PilotfishError as error:
        print(f"pilotfish {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left: `pilotfish ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "pilotfish":
            raise
        print(
            f"pilotfish {args.command}: {error.name} is not installed; this command needs: pip install 'pilotfish[server]'",
            file=sys.stderr,
        )
        return 1


def _module(command: str):  # type: ignore[no-untyped-def]
    return importlib.import_module(f".{command.replace('-', '_')}", __package__)


if __name__ == "__main__":
    sys.exit(main())
