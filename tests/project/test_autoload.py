"""The start-up shim: found where lm_eval does not look, inert where it does, never in the way."""

from __future__ import annotations

import re
import sys
import textwrap

import pytest

from tests.helpers import evaluations


def python(code: str, cwd=None, **environment) -> str:
    """Run `code` in a new interpreter and return what it printed."""
    words = [sys.executable, "-c", textwrap.dedent(code)]
    return evaluations.run(words, cwd, check=True, **environment).stdout.strip()


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


def test_the_installed_lm_eval_finds_the_model(tmp_path):
    printed = python(
        """
        from lm_eval.api.registry import get_model
        print(get_model("pruned-hf").__module__, get_model("hf").__module__)
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
        model_registry = {}
        def load_plugins(): pass
        """,
    "models/__init__.py": "",
    "tasks/__init__.py": "from lm_eval.tasks._index import TaskIndex",
    "tasks/_index.py": "class TaskIndex: build = staticmethod(list)",
}
CODE = """
    import logging, sys
    logging.basicConfig(stream=sys.stdout)
    import lm_eval.models, lm_eval_pruned.tasks
    from lm_eval import api, tasks
    from pathlib import Path
    ours = Path(lm_eval_pruned.tasks.__path__[0])
    given = [Path(tasks.__file__).parent, ours]
    print(api.registry.model_registry, tasks.TaskIndex.build(given) == given)
    """


@pytest.mark.parametrize(
    ("registry", "said"),
    [
        # Where lm_eval reads the entry points, the shim leaves it alone.
        (NEWER["api/registry.py"], "{} True"),
        # A registry of another make costs a warning and nothing else.
        ("model_registry = None", r"WARNING:.*\nNone True"),
    ],
)
def test_another_release_of_lm_eval_is_left_alone(tmp_path, registry, said):
    for name, text in {**NEWER, "api/registry.py": registry}.items():
        path = tmp_path / "lm_eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    assert re.fullmatch(said, python(CODE, PYTHONPATH=tmp_path))


def test_folders_behind_links_are_scanned_once(tmp_path):
    """As in an environment that is, or is reached through, a symbolic link."""
    python(
        """
        from pathlib import Path
        import lm_eval.tasks
        import lm_eval_pruned.tasks
        from lm_eval.tasks._index import TaskIndex

        def linked(folder):
            link = Path(folder.parent.name).absolute()
            link.symlink_to(folder)
            return link

        own = Path(lm_eval.tasks.__file__).parent
        ours = Path(lm_eval_pruned.tasks.__path__[0])
        scanned = []
        TaskIndex._iter_yaml_files = staticmethod(lambda root: scanned.append(root) or [])
        for given in [own], [linked(own), linked(ours)], [own, ours / "demo" / ".."]:
            TaskIndex.build(given)
        assert [path.resolve() for path in scanned] == 3 * [own, ours.resolve()], scanned
        """,
        cwd=tmp_path,
    )
