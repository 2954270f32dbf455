"""The start-up shim: found where lm_eval does not look, inert where it does, never in the way."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lm_eval_pruned import _autoload


ROOT = Path(_autoload.__file__).parents[1]


def python(code: str, *, cwd=None, path=None, flags=()) -> str:
    """Run `code` in a new interpreter and return what it printed."""
    more = {} if path is None else {"PYTHONPATH": str(path)}
    run = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **more},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_starting_python_imports_nothing_heavy_and_installs_once():
    printed = python(
        """
        import sys
        print(*sys.modules)
        from lm_eval_pruned import _autoload
        _autoload.install()
        print(sum(type(f).__name__ == "_HarnessFinder" for f in sys.meta_path))
        """
    )
    *modules, installed = printed.split()
    assert "lm_eval_pruned._autoload" in modules, "the .pth is not installed"
    assert not {"torch", "lm_eval", "transformers", "numpy"} & {*modules}
    assert installed == "1"


def test_a_python_without_any_dependency_starts():
    printed = python(
        f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import lm_eval_pruned._autoload as autoload
        autoload.install()
        for name in ("lm_eval", "lm_eval.models", "torch"):
            try:
                __import__(name)
            except ModuleNotFoundError as error:
                print(error.name)
        """,
        flags=["-I", "-S"],
    )
    assert printed.split() == ["lm_eval", "lm_eval", "torch"]


def test_the_installed_lm_eval_finds_the_model(tmp_path):
    printed = python(
        """
        import importlib, inspect
        from lm_eval.api.registry import get_model
        import lm_eval.models as models
        print(get_model("pruned-hf").__module__, get_model("hf").__module__)
        # The wrapped module looks like any other.
        assert type(models.__spec__.loader).__module__ != "lm_eval_pruned._autoload"
        assert inspect.getsource(models)
        importlib.reload(models)
        """,
        cwd=tmp_path,
    )
    ours = "lm_eval_pruned.model_wrappers.pruned_hf"
    assert printed.split() == [ours, "lm_eval.models.huggingface"]


#: A stand-in for a release of lm_eval that reads both entry-point groups itself.
NEWER = {
    "__init__.py": "",
    "api/__init__.py": "",
    "api/registry.py": """
        from importlib.metadata import entry_points
        class Registry(dict):
            def register(self, name, target):
                assert name not in self, f"{name} registered twice"
                self[name] = target
        model_registry = Registry()
        def load_plugins():
            for each in entry_points(group="lm_eval.models"):
                model_registry.register(each.name, each.value)
        """,
    "models/__init__.py": "",
    "tasks/__init__.py": """
        from importlib.metadata import entry_points
        from importlib.util import find_spec
        from pathlib import Path
        from lm_eval.tasks._index import TaskIndex
        def folders():
            yield Path(__file__).parent
            for each in entry_points(group="lm_eval.tasks"):
                yield Path(find_spec(each.module).submodule_search_locations[0])
        """,
    "tasks/_index.py": """
        class TaskIndex:
            build = staticmethod(list)
        """,
}
INERT = """
    import lm_eval.models
    from lm_eval.api import registry
    print(len(registry.model_registry))
    registry.load_plugins()
    print("pruned-hf" in registry.model_registry)
    from lm_eval import tasks
    ours = [path for path in tasks.TaskIndex.build(tasks.folders()) if path.name == "tasks"]
    print(len(ours), len(set(ours)))
    """
WARNS = """
    import logging, sys
    logging.basicConfig(stream=sys.stdout)
    import lm_eval.models
    """


@pytest.mark.parametrize(
    ("registry", "code", "said"),
    [
        # Where lm_eval reads the entry points, the shim leaves it alone.
        (NEWER["api/registry.py"], INERT, r"0\nTrue\n2 2"),
        # A registry of another make costs a warning and nothing else.
        ("model_registry = None", WARNS, r"WARNING:.*"),
    ],
)
def test_another_release_of_lm_eval_is_left_alone(tmp_path, registry, code, said):
    for name, text in {**NEWER, "api/registry.py": registry}.items():
        path = tmp_path / "lm_eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    assert re.fullmatch(said, python(code, path=tmp_path))


@pytest.mark.parametrize(
    "given",
    ["[own]", "[linked(own), linked(ours)]", "[str(own), str(ours / 'demo' / '..')]"],
)
def test_folders_behind_links_are_scanned_once(given, tmp_path):
    """As in an environment that is, or is reached through, a symbolic link."""
    python(
        f"""
        from pathlib import Path
        import lm_eval.tasks
        import lm_eval_pruned.tasks
        from lm_eval.tasks._index import TaskIndex

        def linked(folder):
            link = Path("links", *folder.parts[-2:])
            link.parent.mkdir(parents=True)
            link.symlink_to(folder)
            return link.absolute()

        own = Path(lm_eval.tasks.__file__).parent
        ours = Path(lm_eval_pruned.tasks.__path__[0])
        scanned = []
        TaskIndex._iter_yaml_files = staticmethod(lambda root: scanned.append(root) or [])
        TaskIndex.build({given})
        assert [path.resolve() for path in scanned] == [own.resolve(), ours.resolve()], scanned
        """,
        cwd=tmp_path,
    )


def test_a_bare_clone_is_a_whole_package():
    """As when Python starts at the root of a clone while a wheel is installed."""
    printed = python(
        f"""
        import sys
        sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
        sys.path.insert(0, {str(ROOT)!r})
        import lm_eval_pruned.tasks, lm_eval_pruned.model_wrappers
        print(lm_eval_pruned.tasks.__file__)
        """
    )
    assert printed == f"{ROOT}/tasks/__init__.py"
