"""Mutation testing: does a test fail when one operator of the core is changed?

``python tools/mutation.py pruning.plan`` changes `lm_eval_pruned.pruning.plan` in every way
that cosmic-ray knows, one at a time, and runs that module's tests on each version.
Needs ``pip install cosmic-ray``. ``docs/hardening.md`` holds the results.

The tests are collected once; each mutant of a function that no import calls is a fork
of that process in which the function gets other code. Any other mutant is a fork of a
process that has imported torch and transformers, and imports the changed module from
memory. So no file is touched. Results are appended to ``build/mutation`` as they come,
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
import inspect
import itertools
import json
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings
from scipy.stats import binomtest


if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[1]
#: Survivors that no test can tell from the original, with the reason.
EQUIVALENT = ROOT / "tests" / "data" / "equivalent_mutants.json"
FOLDER = ROOT / "build" / "mutation"

#: The tests that say what each module of the core must do, the quickest first.
TESTS = {
    **{
        f"pruning.{part}": [
            "pruning/test_arguments.py",
            "pruning/test_expansion.py",
            "checkpoints/test_planning.py",
        ]
        for part in ("arguments", "plan")
    },
    "pruning.criteria": [
        "pruning/test_criteria.py",
        "pruning/test_criteria_registry.py",
    ],
    **{
        f"pruning.{part}": ["pruning/test_glu.py", "pruning/test_layouts_properties.py"]
        for part in ("layouts",)
    },
    **{
        f"pruning.{part}": [
            "pruning/test_pruning.py",
            "checkpoints/test_layouts_layers.py",
            "pruning/test_calibration.py",
            "pruning/test_arguments.py",
        ]
        for part in ("slicing", "record")
    },
    **{
        f"checkpoints.{part}": [
            "checkpoints/test_loading.py",
            "pruning/test_known_scores.py",
            "checkpoints/test_layouts_layers.py",
            "pruning/test_pruning.py",
            "pruning/test_arguments.py",
        ]
        for part in ("configs", "load", "request")
    },
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
    """Notes, for each test, which lines of some files it runs and how long it takes."""

    def __init__(self, paths: set[str]) -> None:
        self.paths = paths
        self.lines: dict[str, set[int]] = {}
        self.tests: dict[str, dict] = {}

    def _call(self, frame, event, arg):
        return self._line if frame.f_code.co_filename in self.paths else None

    def _line(self, frame, event, arg):
        self.lines.setdefault(frame.f_code.co_filename, set()).add(frame.f_lineno)
        return self._line

    def start(self) -> None:
        threading.settrace(self._call)
        sys.settrace(self._call)

    def stop(self, name: str, seconds: float) -> None:
        threading.settrace(None)  # type: ignore[arg-type]
        sys.settrace(None)
        lines = {path: sorted(numbers) for path, numbers in self.lines.items()}
        self.tests[name] = {"lines": lines, "seconds": seconds}
        self.lines = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        start = time.monotonic()
        self.start()
        result = yield
        self.stop(item.nodeid, time.monotonic() - start)
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


class _Failures:
    """Writes which test failed and how."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def pytest_runtest_logreport(self, report):
        if report.failed:
            with self.log.open("a") as stream:
                stream.write(f"{report.longreprtext}\nFAILED {report.nodeid}\n")


def _in_fork(run: Callable[[], int]) -> int:
    """Return what `run` returns in a fork, or the negative number of the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = run()
        finally:
            sys.stdout.flush()
            os._exit(int(code))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _redirect(log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)


def _pytest(tests: list[str], *plugins) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    settings.register_profile(
        "mutants",
        deadline=None,
        max_examples=10,
        # A failure is enough: its smallest example is not looked for.
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    return pytest.main(
        ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:anyio", "--hypothesis-seed=0"]
        + ["--hypothesis-profile=mutants", "--tb=line", "-m", "not slow"]
        + [str(ROOT / "tests" / name) for name in tests],
        plugins=list(plugins),
    )


def _run_imported(
    module: str, source: str, seconds: dict[str, float], log: Path
) -> int:
    """Run tests in a process that imports other source of a module."""
    _redirect(log)
    finder = _Mutated(f"lm_eval_pruned.{module}", _path(module), source)
    sys.meta_path.insert(0, finder)
    return _pytest(TESTS[module], _Only(seconds))


def _functions(code: types.CodeType) -> list[types.CodeType]:
    """Return the code of the functions of a module, those inside of functions left out."""
    found = []
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            is_class = not inner.co_flags & inspect.CO_OPTIMIZED
            found += _functions(inner) if is_class else [inner]
    return found


def _changed_function(source: str, mutant: str, path: str):
    """Return a function's code before and after where nothing else differs, or None."""
    before, after = (compile(text, path, "exec") for text in (source, mutant))
    pairs = list(zip(_functions(before), _functions(after), strict=True))
    different = [pair for pair in pairs if pair[0] != pair[1]]
    if len(different) != 1:
        return None
    old, new = different[0]

    def restored(code):
        if code is new:
            return old
        if not isinstance(code, types.CodeType):
            return code
        return code.replace(co_consts=tuple(restored(each) for each in code.co_consts))

    return (old, new) if restored(after) == before else None


class _Session:
    """Runs mutants in forks of a pytest session that has collected its tests."""

    def __init__(self, modules: list[str], log: Path, work) -> None:
        self.log, self.work = log, work
        self.reach = _Reach({str(_path(module)) for module in modules})
        # What is imported, decorated or drawn up for parameters.
        self.reach.start()

    def pytest_runtestloop(self, session):
        self.reach.stop("", 0)
        self.session = session
        self.imported = self.reach.tests[""]["lines"]
        self.live = [
            each
            for each in gc.get_objects()
            if isinstance(each, types.FunctionType)
            and each.__code__.co_filename in self.reach.paths
        ]
        unchanged = self.log.with_suffix(".json")
        if not unchanged.exists() and self.run(self.reach, lambda: None) != 0:
            raise SystemExit(f"The tests fail unchanged: {self.log}")
        self.work(self)
        return True

    def run(self, plugin, change) -> int:
        """Run the tests that `plugin` selects in a fork that `change` was called in."""
        import _pytest.main

        def loop() -> int:
            session, manager = self.session, self.session.config.pluginmanager
            manager.register(_Failures(self.log))
            manager.register(plugin)
            if isinstance(plugin, _Only):
                plugin.pytest_collection_modifyitems(session.items)
            change()
            try:
                _pytest.main.pytest_runtestloop(session)
            except (session.Failed, session.Interrupted):
                pass
            if isinstance(plugin, _Reach) and not session.testsfailed:
                self.log.with_suffix(".json").write_text(json.dumps(plugin.tests))
            return int(session.testsfailed > 0)

        self.log.write_text("")
        os.environ["PYTEST_DEBUG_TEMPROOT"] = tempfile.mkdtemp()
        code = _in_fork(loop)
        shutil.rmtree(os.environ["PYTEST_DEBUG_TEMPROOT"], ignore_errors=True)
        return code

    def run_changed(self, old, new, seconds: dict[str, float]) -> int | None:
        """Run tests with other code of one function; None where imports have run it."""
        path = old.co_filename
        lines = {number for *_, number in old.co_lines() if number}
        lines -= {old.co_firstlineno}
        for inner in old.co_consts:
            if isinstance(inner, types.CodeType):
                lines |= {number for *_, number in inner.co_lines() if number}
        found = [f for f in self.live if f.__code__ == old]
        same_cells = old.co_freevars == new.co_freevars
        if not (found and same_cells) or lines & set(self.imported.get(path, [])):
            return None

        def change() -> None:
            for function in found:
                function.__code__ = new

        return self.run(_Only(seconds), change)


class _Tests:
    """The tests of a module, and which of them can tell a mutant from it."""

    def __init__(self, module: str, source: str, reach: dict[str, dict]) -> None:
        path = str(_path(module))
        self.reach = {
            name: {**test, "lines": test["lines"].get(path, [])}
            for name, test in reach.items()
        }
        self.imported = self.reach.pop("")["lines"]
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

        Where imports run what was changed, and decorators and defaults are such, all
        tests run.

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
            if line < body
            or not end
            or any(body <= number <= end for number in (*self.imported, *test["lines"]))
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


class _Module:
    """A module, its mutants and what became of them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.source = _path(name).read_text(encoding="utf-8")
        self.mutants = mutants(self.source)
        self.results: dict[str, dict] = {}
        self.tries: Counter[str] = Counter()
        self.file = FOLDER / f"{name}-{zlib.crc32(self.source.encode()):08x}.jsonl"
        self.read()

    def read(self) -> None:
        """Read the results of this source from before."""
        self.tries.clear()
        if self.file.exists():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                result = json.loads(line)
                if result["name"] in self.mutants:
                    self.tries[result["name"]] += 1
                    self.results[result["name"]] = result

    def pending(self, first: int | None, again: bool) -> list[str]:
        """Return the names of the mutants to try.

        Args:
            first: Of so many.
            again: Those that survived instead of those that were not tried.
        """
        names = list(self.mutants)[:first]
        if again:
            names = [n for n in names if self.results.get(n, {}).get("survived")]
        else:
            names = [n for n in names if n not in self.results]
        equivalent = _equivalent(self.name)
        changes = {n: _change(self.source, self.mutants[n]) for n in names}
        for name, change in changes.items():
            if change in equivalent and not again:
                self.note(name, *change, code=0, test=None, end="known as equivalent")
        return [name for name in names if changes[name] not in equivalent]

    def note(self, name: str, before: str, after: str, **end) -> None:
        """Keep what a mutant came to."""
        self.results[name] = {
            "name": name,
            "survived": not is_killed(end["code"]),
            "before": before,
            "after": after,
            **end,
        }
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(self.results[name]) + "\n")

    def report(self) -> None:
        """Print what became of the mutants."""
        equivalent = _equivalent(self.name)
        survivors = [r for r in self.results.values() if r["survived"]]
        unknown = [r for r in survivors if (r["before"], r["after"]) not in equivalent]
        tried = len(self.results)
        if not tried:
            return
        killed = tried - len(survivors)
        interval = ""
        if tried < len(self.mutants):
            low, high = binomtest(killed, tried).proportion_ci(method="wilson")
            interval = f", 95 % interval {100 * low:.0f} to {100 * high:.0f} %"
        print(
            f"{self.name}: {len(self.mutants)} mutants, {tried} tried, {killed} killed "
            f"({100 * killed / tried:.1f} %{interval}), "
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


def _try(modules: list[_Module], first: int | None, again: bool) -> None:
    """Try mutants of modules that have the same tests."""
    tests = TESTS[modules[0].name]
    todo = {module.name: module.pending(first, again) for module in modules}
    if not any(todo.values()):
        return
    state = [module.source for module in modules]
    state += [(ROOT / "tests" / name).read_text() for name in tests]
    log = FOLDER / f"unchanged-{zlib.crc32(''.join(state).encode()):08x}.log"
    reach = log.with_suffix(".json")

    def attempt(run: Callable[..., int | None], log: Path) -> None:
        seen = json.loads(reach.read_text())
        promises = {m.name: _Tests(m.name, m.source, seen) for m in modules}
        # In turn: a run that is stopped leaves a sample of each.
        for names in itertools.zip_longest(*map(list, todo.values())):
            for module, name in zip(modules, names, strict=True):
                if name is None:
                    continue
                mutant, promise = module.mutants[name], promises[module.name]
                killers, chosen = promise.for_mutant(mutant)
                seconds = {test: seen[test]["seconds"] for test in chosen}
                code = run(module, mutant, seconds)
                if code is None:
                    continue
                output = log.read_text(errors="replace")
                # By what it ended: a failing test, and not the lack of a file.
                failed = promise.failed(output)
                if failed and failed not in killers:
                    killers.append(failed)
                change = _change(module.source, mutant)
                module.note(name, *change, code=code, test=failed, end=output[-400:])

    def changed(session: _Session) -> None:
        def run(module: _Module, mutant: str, seconds: dict[str, float]) -> int | None:
            pair = _changed_function(module.source, mutant, str(_path(module.name)))
            return None if pair is None else session.run_changed(*pair, seconds)

        attempt(run, session.log)

    def imported(module: _Module, mutant: str, seconds: dict[str, float]) -> int:
        return _in_fork(
            partial(_run_imported, module.name, mutant, seconds, imported_log)
        )

    _in_fork(lambda: _in_session([m.name for m in modules], tests, log, changed))
    if not reach.exists():
        raise SystemExit(f"The tests fail unchanged: {log}")
    for module in modules:
        before = module.tries.copy()
        module.read()
        todo[module.name] = [
            name for name in todo[module.name] if module.tries[name] == before[name]
        ]
    imported_log = log.with_name(f"{log.stem}-imported.log")
    attempt(imported, imported_log)


def _in_session(modules: list[str], tests: list[str], log: Path, work) -> int:
    _redirect(log.with_suffix(".out"))
    return _pytest(tests, _Session(modules, log, work))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", choices=TESTS, nargs="+")
    parser.add_argument("--again", action="store_true", help="survivors only, anew")
    parser.add_argument("--first", type=int, help="try so many: a random sample")
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
    FOLDER.mkdir(parents=True, exist_ok=True)
    modules = [_Module(name) for name in options.module]
    if not options.report:
        for name in _WARM:
            importlib.import_module(name)
        # pytest collects garbage often; what was imported here is none.
        gc.freeze()
        for tests in {tuple(TESTS[module.name]) for module in modules}:
            _try(
                [m for m in modules if tuple(TESTS[m.name]) == tests],
                options.first,
                options.again,
            )
    for module in modules:
        module.report()


if __name__ == "__main__":
    main()
