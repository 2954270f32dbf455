"""The command ``lm-eval-pruned``: what surrounds one run of ``lm_eval``."""

import io
import os
import sys


#: Each is a file of this folder, whose docstring its ``--help`` shows, with `OPTIONS` and `run`.
COMMANDS = {
    "plan": "widths and parameters at several sizes, from a config",
    "compare": "paired statistics of runs against a base",
    "power": "how likely a comparison reaches a verdict, from the answers that changed so far",
    "report": "a sweep as Markdown, CSV, HTML and plots",
    "check": "compare results with a committed baseline, for CI",
    "verdict": "whether a compressed model may be shipped in place of its base",
    "sweep": "many sizes by many tasks, resumable",
    "study": "the study of arXiv 2512.22671 for any model, with a verdict on one page",
    "sensitivity": "what it costs to cut one layer at a time, by criterion and width",
    "profile": "latency, throughput, memory and energy at several sizes",
    "prune": "write a pruned model as an ordinary checkpoint",
    "heal": "train a pruned model again: an adapter, or all weights",
}
#: The extra that brings a package which not every command needs, by the name it is imported by.
EXTRAS = {"altair": "report", "vl_convert": "report", "gguf": "demo"}
EXTRAS |= {"ray": "ray", "vllm": "vllm"}
#: Exit code of an error of ours, as in BSD's sysexits; 1 is an answer of `check` and `verdict`.
OUR_ERROR = 70
#: Warnings of packages underneath that no user can act on: words of theirs, by the logger that gives them.
NOISE = {
    "torchao": "Failed to load",
    "torch.utils._pytree": "natively supported by",
    "lm_eval.api.task": "Custom kwargs can be passed",
}


def parser(words: list[str]):
    """Return an `argparse.ArgumentParser` for a command line of these words.

    Only a command that they name is imported, and declares its options.
    """
    # Here, so that Ctrl-C during the imports ends in one line too.
    import argparse
    from importlib import import_module
    from importlib.metadata import version

    from lm_eval_pruned.util.options import add_options, nearest

    class Version(argparse.Action):
        """Prints the version; the site shows the help of a package that is not installed."""

        def __call__(self, parser, *_) -> None:
            print(f"{parser.prog} {version(parser.prog)}")
            parser.exit()

    class Parser(argparse.ArgumentParser):
        """Suggests a known option for one that is unknown, as do the parsers of its commands."""

        def parse_known_args(self, args=None, namespace=None):
            self.words = args or []
            parsed, unknown = super().parse_known_args(args, namespace)
            if unknown:
                super().error(self.unrecognized(unknown))
            return parsed, unknown

        def unrecognized(self, unknown) -> str:
            message = f"unrecognized arguments: {' '.join(unknown)}"
            for word in unknown:
                if word.startswith("-"):
                    hint = nearest(word.split("=")[0], self.known(), "see --help.")
                    return f"{message}: {hint}"
            return message

        def known(self) -> list[str]:
            return [name for row in self._actions for name in row.option_strings]

        def error(self, message):
            # A misspelt option that is required would be reported as missing alone.
            options = [w.split("=")[0] for w in self.words if w.startswith("--")]
            unknown = [
                w for w in options if not any(n.startswith(w) for n in self.known())
            ]
            if "are required" in message and unknown:
                message += f"; {self.unrecognized(unknown)}"
            super().error(message)

    program = Parser(
        prog="lm-eval-pruned",
        description="Width pruning around lm-evaluation-harness. To evaluate a pruned model, "
        "run `lm_eval --model pruned-hf --model_args ratio=2.0 --tasks ...`.",
    )
    program.add_argument(
        "--version", action=Version, nargs=0, help="show the version and exit"
    )
    commands = program.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in COMMANDS.items():
        command = commands.add_parser(name, help=about)
        if name not in words:
            continue
        module = import_module(f"lm_eval_pruned.cli.{name}")
        command.description = module.__doc__
        add_options(command, module.OPTIONS)
        command.add_argument(
            "--verbose",
            action="store_true",
            help="show tracebacks, and warnings of other packages that change no result",
        )
        command.set_defaults(run=module.run)
    return program


def say(text: str) -> None:
    """Print an answer; a reader that has gone, as of `| head -1`, does not change the exit code."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # What is left in the buffer would fail again when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: list[str] | None = None) -> int:
    """Run the command that these words spell, or those of the process; return its exit code.

    That is the command's own, 2 for words or input that cannot be used, 130 after Ctrl-C, and 70 for an
    error of ours, whose traceback is shown.
    """
    name, words = "lm-eval-pruned", sys.argv[1:] if argv is None else argv
    verbose = False
    # A character that the terminal's encoding lacks must not lose the answer.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        arguments = parser(words).parse_args(words)
        name, verbose = f"{name} {arguments.command}", arguments.verbose
        output = getattr(arguments, "output_path", None)
        if output and not getattr(arguments, "dry_run", False):
            from pathlib import Path

            from lm_eval_pruned.util.atomic import check_writable

            check_writable(Path(output))
        if not verbose:
            import logging

            for logger, noise in NOISE.items():
                shown = lambda record, noise=noise: noise not in str(record.msg)
                logging.getLogger(logger).addFilter(shown)
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    # An exception that leaves here would end with 1, which is an answer.
    except Exception as error:  # noqa: BLE001
        package = str(getattr(error, "name", None)).partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError)
        code, message = 2, str(error)
        if missing and package in EXTRAS:
            message = (
                f"this needs the package {package}, which is not installed: run "
                f"`pip install 'lm-eval-pruned[{EXTRAS[package]}]'`."
            )
        elif not isinstance(error, ValueError | OSError):
            from importlib.metadata import metadata

            code, page = OUR_ERROR, metadata("lm-eval-pruned")["Home-page"]
            message = (
                "this is a bug of lm-eval-pruned: please report it, with the lines above, at "
                f"{page}/issues"
            )
        if code == OUR_ERROR or verbose:
            import traceback

            traceback.print_exc()
    print(f"{name}: error: {message}", file=sys.stderr)
    return code
