"""Makes the stock ``lm_eval`` command find this package's models and tasks.

Release 0.4.13 of lm-evaluation-harness reads neither of the entry-point groups
``lm_eval.models`` (its pull request 4013, listed as merged) and ``lm_eval.tasks``
(4015, open). For versions that lack one of them, a ``.pth`` file calls
`install` when Python starts. It adds one import hook, which does nothing until
lm_eval itself imports the module that holds its model registry or its task
index, and then adds there what the entry points declare and lm_eval has not
added on its own.
"""

import sys


MODELS_GROUP = "lm_eval.models"
TASKS_GROUP = "lm_eval.tasks"


def install() -> None:
    """Put the import hook in front of ``sys.meta_path``, once per interpreter."""
    if not any(type(finder) is _HarnessFinder for finder in sys.meta_path):
        sys.meta_path.insert(0, _HarnessFinder())


class _HarnessFinder:
    """Meta-path finder that wraps the loaders of two of the harness's modules."""

    def find_spec(self, name, path=None, target=None):
        completion = _COMPLETIONS.get(name)
        if completion is None:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _CompletingLoader(spec.loader, completion)  # type: ignore[assignment]
                return spec
        return None


class _CompletingLoader:
    """Loader that runs `completion` on a module after the real loader ran it."""

    def __init__(self, loader, completion):
        self._loader = loader
        self._completion = completion

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        try:
            self._completion(module)
        except Exception as error:  # noqa: BLE001
            import logging

            logging.getLogger(__name__).warning(
                "lm-eval-pruned could not add its entry points to %s (%s: %s); "
                "its models and tasks may be missing from this run.",
                module.__name__,
                type(error).__name__,
                error,
            )


def _register_models(module) -> None:
    """Add the entry points of `MODELS_GROUP` that the registry does not know yet.

    Where lm_eval reads the group itself, `Registry.__contains__` already answers
    for it, or `load_plugins` exists and will, so nothing is added.
    """
    from importlib.metadata import entry_points

    from lm_eval.api import registry

    if hasattr(registry, "load_plugins"):
        return
    for entry_point in entry_points(group=MODELS_GROUP):
        if entry_point.name not in registry.model_registry:
            registry.model_registry.register(entry_point.name, target=entry_point.value)


def _index_tasks(module) -> None:
    """Let `TaskIndex.build` scan the folders named by `TASKS_GROUP`.

    They are scanned after the harness's own tasks and before a user's
    ``--include_path``, as pull request 4015 does, and only where the harness's
    own tasks are asked for and the folder is not in the list already, by
    whatever links either is reached.
    """
    from pathlib import Path

    build = module.TaskIndex.build
    own_tasks = Path(module.__file__).parent.resolve()

    def build_with_plugins(paths, **kwargs):
        paths = [Path(path) for path in paths]
        known = [path.resolve() for path in paths]
        if own_tasks in known:
            after_own = known.index(own_tasks) + 1
            for folder in reversed(_task_folders()):
                if folder.resolve() not in known:
                    known.append(folder.resolve())
                    paths.insert(after_own, folder)
        return build(paths, **kwargs)

    module.TaskIndex.build = staticmethod(build_with_plugins)


def _task_folders():
    """Return the folders of the packages that `TASKS_GROUP` names, without importing them."""
    from importlib.metadata import entry_points
    from importlib.util import find_spec
    from pathlib import Path

    folders = []
    for entry_point in entry_points(group=TASKS_GROUP):
        spec = find_spec(entry_point.module)
        for location in (spec and spec.submodule_search_locations) or ():
            folders.append(Path(location))
    return folders


_COMPLETIONS = {
    "lm_eval.models": _register_models,
    "lm_eval.tasks._index": _index_tasks,
}
