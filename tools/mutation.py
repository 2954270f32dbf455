"""Mutation testing: does a test fail when one operator of the core is changed?

``python tools/mutation.py pruning.plan`` changes `lm_eval_pruned.pruning.plan` in every way
that cosmic-ray knows, one at a time, and runs that module's tests on each version.
Needs ``pip install cosmic-ray``. ``docs/hardening.md`` holds the results.

torch and transformers are imported once; each mutant is a fork of that process in
which the changed module is compiled from memory, so no file is touched and a
mutant costs about a second. Results are appended to ``build/mutation`` as they come,
and a later run goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import gc
import importlib
import importlib.abc
import importlib.util
import json
import math
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings


ROOT = Path(__file__).resolve().parents[1]
#: Survivors that no test can tell from the original, with the reason.
EQUIVALENT = ROOT / "tests" / "data" / "equivalent_mutants.json"

#: The tests that say what each module of the core must do, the quickest first.
TESTS = {
    **{
        f"pruning.{part}": ["pruning/test_expansion.py", "checkpoints/test_planning.py"]
        for part in ("arguments", "plan")
    },
    "pruning.criteria": [
        "pruning/test_criteria.py",
        "pruning/test_criteria_registry.py",
    ],
    **{
        f"pruning.{part}": ["pruning/test_glu.py", "pruning/test_layouts_properties.py"]
        for part in ("layouts", "regions")
    },
    **{
        f"pruning.{part}": [
            "pruning/test_pruning.py",
            "checkpoints/test_layouts_layers.py",
            "pruning/test_calibration.py",
        ]
        for part in ("slicing", "record")
    },
    **{
        f"checkpoints.{part}": [
            "checkpoints/test_loading.py",
            "checkpoints/test_transformers_api.py",
            "pruning/test_known_scores.py",
            "checkpoints/test_layouts_layers.py",
            "pruning/test_pruning.py",
        ]
        for part in ("load", "request", "route", "session", "narrowed", "sources")
    },
    "checkpoints.transformers_api": [
        "checkpoints/test_transformers_api.py",
        "checkpoints/test_loading.py",
    ],
}
#: Of the many replacements of one operator, how many to try at each place.
PER_PLACE = 2
#: A test counts as hanging after this many seconds, and thrice the time that it needs.
PATIENCE = 10
MEMORY_LIMIT = 12 << 30


def _path(module: str) -> Path:
    return ROOT.joinpath("lm_eval_pruned", *module.split(".")).with_suffix(".py")


def mutants(source: str) -> dict[str, str]:
    """Return changed versions of `source` by name; those that change code that runs."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    places: dict[tuple, list[tuple[str, int]]] = {}
    tree = get_ast(source)
    for name in operator_names():
        if name.endswith("NoOp") or get_operator(name).arguments():
            continue
        operator, occurrence = get_operator(name)(), 0
        kind = name.split("_")[0]
        for node in ast_nodes(tree):
            for place in operator.mutation_positions(node):
                places.setdefault((kind, str(place)), []).append((name, occurrence))
                occurrence += 1
    original = _code(source)
    found: dict[str, str] = {}
    for candidates in places.values():
        candidates.sort(key=lambda pair: zlib.crc32(repr(pair).encode()))
        tried = 0
        for name, occurrence in candidates:
            mutant = mutate_code(source, get_operator(name)(), occurrence)
            # What is no Python would be killed by any test.
            changed = mutant and _code(mutant) not in (None, original)
            if changed and mutant not in found.values():
                found[f"{name.removeprefix('core/')}:{occurrence}"] = mutant
                tried += 1
            if tried == PER_PLACE:
                break
    # In an order without a pattern, a run that is stopped leaves a random sample.
    return dict(sorted(found.items(), key=lambda pair: zlib.crc32(pair[0].encode())))


def _code(source: str) -> str | None:
    """Return what of `source` is executed, or None where it is no Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        # Annotations are never evaluated: every module postpones them.
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Name("_")
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = [ast.Pass()]
    return ast.dump(tree)


class _Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from changed source."""

    def __init__(self, module: str, path: Path, source: str) -> None:
        self.module, self.path, self.source = module, path, source

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.module:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)  # noqa: S102


class _Reach:
    """Notes, for each test, which lines of one file it runs and how long it takes."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.lines: set[int] = set()
        self.tests: dict[str, dict] = {}

    def _call(self, frame, event, arg):
        return self._line if frame.f_code.co_filename == self.path else None

    def _line(self, frame, event, arg):
        self.lines.add(frame.f_lineno)
        return self._line

    def start(self) -> None:
        threading.settrace(self._call)
        sys.settrace(self._call)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.lines, start = set(), time.monotonic()
        self.start()
        result = yield
        self.tests[item.nodeid] = {
            "lines": sorted(self.lines),
            "seconds": time.monotonic() - start,
        }
        return result


class _Only:
    """Runs the named tests alone, in that order, and ends the process if one hangs."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.place = {name: i for i, name in enumerate(seconds)}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        signal.alarm(math.ceil(PATIENCE + 3 * self.seconds[item.nodeid]))
        return (yield)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = sorted(
            (item for item in items if item.nodeid in self.place),
            key=lambda item: self.place[item.nodeid],
        )


def end_of(module: str, source: str, plugin, log: Path) -> int:
    """Run a module's tests in a fork in which it has other source.

    Args:
        module: Name of the module.
        source: Its source.
        plugin: `_Reach` or `_Only`.
        log: File for what pytest prints.

    Returns:
        The exit code of pytest, or the negative number of the signal that ended it.
    """
    child = os.fork()
    if child == 0:
        _run_tests(module, source, plugin, log)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _run_tests(module: str, source: str, plugin, log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 70
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
        path = _path(module)
        sys.meta_path.insert(0, _Mutated(f"lm_eval_pruned.{module}", path, source))
        settings.register_profile(
            "mutants",
            deadline=None,
            max_examples=10,
            # A failure is enough: its smallest example is not looked for.
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        code = pytest.main(
            [
                "-x",
                "-q",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:anyio",
                "--hypothesis-seed=0",
            ]
            + ["--hypothesis-profile=mutants", "--tb=line", "-m", "not slow"]
            + [str(ROOT / "tests" / name) for name in TESTS[module]],
            plugins=[plugin],
        )
        if isinstance(plugin, _Reach):
            sys.settrace(None)
            log.with_suffix(".json").write_text(json.dumps(plugin.tests))
    finally:
        sys.stdout.flush()
        os._exit(int(code))


class _Tests:
    """The tests of a module, and which of them can tell a mutant from it."""

    def __init__(self, module: str, source: str, log: Path) -> None:
        plugin = _Reach(_path(module))
        if end_of(module, source, plugin, log) != 0:
            raise SystemExit(f"The tests fail unchanged: {log}")
        self.reach = json.loads(log.with_suffix(".json").read_text())
        self.functions = [
            (
                min(n.lineno for n in (node, *node.decorator_list)),
                node.body[0].lineno,
                node.end_lineno or 0,
            )
            for node in ast.walk(ast.parse(source))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        self.source = source
        self._killers: dict[tuple[int, int], list[str]] = {}

    def for_mutant(self, mutant: str) -> tuple[list[str], list[str]]:
        """Return the tests that run the function that was changed, by promise.

        Where a change is outside of functions, all tests run.

        Returns:
            Those that killed other mutants of that function, to be added to, and
            all: these first, then the quickest.
        """
        blocks = difflib.SequenceMatcher(
            None, self.source.splitlines(), mutant.splitlines(), autojunk=False
        ).get_opcodes()
        line = 1 + next(start for tag, start, *_ in blocks if tag != "equal")
        inner = [f for f in self.functions if f[0] <= line <= f[2]]
        _, body, end = max(inner, default=(0, 0, 0))
        chosen = [
            name
            for name, test in self.reach.items()
            if not end or any(body <= number <= end for number in test["lines"])
        ]
        killers = self._killers.setdefault((body, end), [])
        return killers, sorted(
            chosen,
            key=lambda name: (name not in killers, self.reach[name]["seconds"]),
        )

    def failed(self, log: str) -> str | None:
        """Return the test that failed, as pytest's summary tells."""
        return next((n for n in self.reach if f"\nFAILED {n}" in log), None)


def is_killed(code: int) -> bool:
    """Return whether pytest failed because of a test, or was stopped by a limit."""
    if code not in (0, 1, 2, 5) and code >= 0:
        raise SystemExit(f"pytest could not run: it ended with {code}")
    return code not in (0, 5)


def _change(source: str, mutant: str) -> tuple[str, str]:
    """Return the lines that differ, before and after."""
    lines = difflib.unified_diff(source.splitlines(), mutant.splitlines(), n=0)
    changed = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    before, after = (
        " / ".join(line[1:].strip() for line in changed if line[0] == sign)
        for sign in "-+"
    )
    return before, after


def _equivalent(module: str) -> set[tuple[str, str]]:
    known = json.loads(EQUIVALENT.read_text()) if EQUIVALENT.exists() else {}
    return {(e["before"], e["after"]) for e in known.get(module, [])}


def _report(module: str, results: dict[str, dict]) -> None:
    equivalent = _equivalent(module)
    survivors = [r for r in results.values() if r["survived"]]
    unknown = [r for r in survivors if (r["before"], r["after"]) not in equivalent]
    killed, total = len(results) - len(survivors), len(results)
    print(
        f"{module}: {total} mutants, {killed} killed ({100 * killed / max(total, 1):.1f} %), "
        f"{len(survivors) - len(unknown)} equivalent, {len(unknown)} survived"
    )
    for result in unknown:
        print(f"  - {result['before']}\n  + {result['after']}")


#: What every fork needs, and nothing of this package.
_WARM = (
    "hypothesis.extra.numpy",
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
    "peft",
    "pytest",
    "transformers.models.auto.modeling_auto",
    *(
        f"transformers.models.{family}.modeling_{family}"
        for family in (
            "cohere",
            "gemma3",
            "gemma3n",
            "gpt2",
            "gpt_neox",
            "llama",
            "mixtral",
            "opt",
            "phi3",
            "qwen3",
            "siglip",
            "smollm3",
            "t5",
        )
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", choices=TESTS)
    parser.add_argument("--again", action="store_true", help="survivors only, anew")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    os.chdir(ROOT)
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HYPOTHESIS_STORAGE_DIRECTORY": tempfile.mkdtemp(),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    module = options.module
    source = (_path(module)).read_text(encoding="utf-8")
    folder = ROOT / "build" / "mutation"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{module}-{zlib.crc32(source.encode()):08x}.jsonl"
    versions = mutants(source)
    results: dict[str, dict] = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            result = json.loads(line)
            if result["name"] in versions:
                results[result["name"]] = result
    if not options.report:
        for name in _WARM:
            importlib.import_module(name)
        # pytest collects garbage often; what was imported here is none.
        gc.freeze()
        tests = _Tests(module, source, folder / f"{module}-unchanged.log")
        equivalent = _equivalent(module)
        start = time.monotonic()
        for name, mutant in versions.items():
            if time.monotonic() - start > options.seconds:
                break
            before, after = _change(source, mutant)
            if name in results and not (
                options.again
                and results[name]["survived"]
                and (before, after) not in equivalent
            ):
                continue
            log, began = folder / f"{module}.log", time.monotonic()
            killers, chosen = tests.for_mutant(mutant)
            seconds = {test: tests.reach[test]["seconds"] for test in chosen}
            code = end_of(module, mutant, _Only(seconds), log)
            output = log.read_text(errors="replace")
            failed = tests.failed(output)
            if failed and failed not in killers:
                killers.append(failed)
            result = {
                "name": name,
                "survived": not is_killed(code),
                "before": before,
                "after": after,
                "seconds": round(time.monotonic() - began, 1),
                "code": code,
                # By what it ended: a failing test, and not the lack of a file.
                "test": failed,
                "end": output[-400:],
            }
            results[name] = result
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(result) + "\n")
    _report(module, results)


if __name__ == "__main__":
    main()
