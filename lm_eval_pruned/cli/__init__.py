"""The command ``lm-eval-pruned``: what surrounds one run of ``lm_eval``."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from importlib.metadata import version


#: Each is a file of this folder.
COMMANDS = (
    *("plan", "compare", "power", "report", "check", "sweep"),
    *("sensitivity", "profile", "prune", "heal"),
)
#: As in the metadata of the package.
DOCUMENTATION = "https://lm-eval-pruned.github.io/lm-eval-pruned/"
#: The extra that brings a package which not every command needs, by the name it is imported by.
EXTRAS = {
    "altair": "report",
    "gguf": "demo",
    "ray": "ray",
    "vl_convert": "report",
    "vllm": "vllm",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="lm-eval-pruned",
        description="Width pruning around lm-evaluation-harness. To evaluate a pruned model, "
        "run `lm_eval --model pruned-hf --model_args ratio=2.0 --tasks ...`.",
    )
    shown = f"{parser.prog} {version(parser.prog)}"
    parser.add_argument(
        "--version", action="version", version=shown, help="show the version and leave"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        import_module(f"lm_eval_pruned.cli.{name}").add(commands)
    for each in (parser, *commands.choices.values()):
        each.epilog = f"Documentation: {DOCUMENTATION}"
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print(f"lm-eval-pruned {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in EXTRAS:
            raise
        message = (
            f"this needs the package {package}, which is not installed: run "
            f"`pip install 'lm-eval-pruned[{EXTRAS[package]}]'`."
        )
    except (ValueError, OSError) as error:
        message = str(error)
    print(f"lm-eval-pruned {arguments.command}: error: {message}", file=sys.stderr)
    return 2
