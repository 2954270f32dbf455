"""Build hooks that setup.cfg cannot express: a ``.pth`` file beside the package.

The one line of ``lm_eval_pruned_autoload.pth`` runs when Python starts and
installs the import hook of ``lm_eval_pruned/_autoload.py``. setuptools has no
metadata key for such a file, so it is added to regular wheels by ``build_py``
and to editable ones by ``editable_wheel``.
"""

import zipfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel


PTH_NAME = "lm_eval_pruned_autoload.pth"
PTH_LINE = (
    'import sys; exec("try:\\n import lm_eval_pruned._autoload as a\\n a.install()'
    '\\nexcept Exception:\\n pass")\n'
)


class BuildPyWithPth(build_py):
    """``build_py`` that also writes the ``.pth`` file at the top of the build."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            path = Path(self.build_lib, PTH_NAME)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(PTH_LINE, encoding="utf-8")

    def get_outputs(self, include_bytecode: int = 1) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        if not self.editable_mode:
            outputs.append(str(Path(self.build_lib, PTH_NAME)))
        return outputs


class EditableWheelWithPth(editable_wheel):
    """``editable_wheel`` that also adds the ``.pth`` file to the wheel and its RECORD."""

    def run(self) -> None:
        super().run()
        for wheel in Path(self.dist_dir).glob("lm_eval_pruned-*editable*.whl"):
            self._add(wheel)

    @staticmethod
    def _add(wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        if PTH_NAME in entries:
            return
        record = next(name for name in entries if name.endswith(".dist-info/RECORD"))
        entries[record] = entries[record].rstrip(b"\n") + f"\n{PTH_NAME},,\n".encode()
        entries[PTH_NAME] = PTH_LINE.encode()
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)


setup(cmdclass={"build_py": BuildPyWithPth, "editable_wheel": EditableWheelWithPth})
