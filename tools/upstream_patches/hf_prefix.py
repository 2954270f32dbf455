"""Prefix sharing as a model type of the harness, made from `model_wrappers/batching`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .merge import Rules, Target, merge
from .patch import ROOT, Patch, copy, describe, register


if TYPE_CHECKING:
    from pathlib import Path

#: What stands before the imports of the helper that needs it.
VERSION = """\
import transformers
from packaging.version import parse as parse_version


if parse_version(transformers.__version__) < parse_version("4.55"):
    raise ImportError(
        "hf-prefix needs transformers 4.55 or newer, whose caches consist of layers; "
        f"{transformers.__version__} is installed."
    )
"""
TEST = "tests/models/test_hf_prefix.py"
TARGETS = (
    Target(
        "lm_eval.models.utils_prefix_tree",
        """A prefix tree over token sequences, and how to cut it into forward passes.

A causal model's state at a token depends on the tokens before it only, so
sequences that begin alike share the work of their common beginning. The tree's
nodes are the distinct (prefix, token) pairs, numbered in depth-first order. Two
properties of that order carry everything else:

- the subtree of node `i` is the range ``[i, end[i])``, so node `j` may attend to
  node `i` exactly when ``i <= j < end[i]``;
- when the order is processed in consecutive ranges, the ancestors that a range
  needs from earlier ranges all lie on the path to its first node: one path of
  cached keys and values is all the memory that a tree of any depth takes.
""",
        ("token_tree",),
    ),
    Target(
        "lm_eval.models.utils_prefix",
        """One pass of a prefix tree through a model, and which models allow it.

A pass takes a run of the tree's nodes behind a cached path, with the position of each
token in its own request and a 4-D mask in which a token sees its own ancestors and
nothing else. Whether a model's code takes such masks, positions and caches is read off
its config and tried on a tiny random model of its class.
""",
        (
            "trial_model",
            "attention_support",
            "path_cache",
            "masks",
            "forward",
            "memory",
            "prefix_pass",
        ),
        VERSION,
    ),
    Target(
        "lm_eval.models.hf_prefix",
        """``hf-prefix``: log-likelihoods in which what requests have in common is computed once.

Multiple-choice tasks send each choice with its whole context, and few-shot tasks send the
same examples with each question. All requests of a call are put into one prefix tree
(`utils_prefix_tree`), each node of it is computed once, and logits are computed at the
scored nodes only (`utils_prefix`).
""",
        ("prefix_sharing",),
    ),
)
#: What upstream does not want, or has to do for more versions of its dependencies than we allow.
RULES = {
    "prefix_sharing": Rules(
        # Records of energy and of which path answered; a defect of theirs that another patch mends.
        leave_out=(
            "PrefixSharingMixin._score_plainly",
            "PrefixSharingMixin.loglikelihood_rolling",
        ),
        change={
            "class PrefixSharingMixin(FastPathMixin):": '@register_model("hf-prefix")\nclass PrefixHFLM(HFLM):',
            """\
            # With sdpa a row is read in blocks, and one row has no padding.
            in_blocks = config_of(self)._attn_implementation == "sdpa"
            ceiling = Budget(most, most if in_blocks else 256, 1024)
""": "            ceiling = Budget(most, 256, 1024)\n",
            "import torch\nfrom tqdm": (
                "import torch\n"
                "from lm_eval.api.registry import register_model\n"
                "from lm_eval.models.huggingface import HFLM\n"
                "from tqdm"
            ),
            'logging.getLogger("lm_eval.models.prefix_sharing")': "logging.getLogger(__name__)",
            """\
    Put it before `HFLM` among the bases. Log-probabilities and greedy flags are
    `HFLM`'s up to rounding. Where a model's attention does not allow it, requests
    take `HFLM`'s own path, and one logged line says why. Whether it does is decided by its
    class and config, on a small random model in float32: neither width nor dtype plays a
    part. ``config.answer_paths`` in the results says which way was taken.
""": """\
    Takes `HFLM`'s arguments. Log-probabilities and greedy flags are `HFLM`'s up to
    rounding. Where a model's attention does not allow it, requests take `HFLM`'s own path,
    and one logged line says why. Whether it does is decided by its class and config, on a
    small random model in float32: neither width nor dtype plays a part.
""",
            '''\
    def __init__(self, *args: Any, prefix_sharing: bool = True, **kwargs: Any) -> None:
        """Set up as the next class does.

        Args:
            *args: Passed on.
            prefix_sharing: Compute common prefixes of log-likelihood requests once.
            **kwargs: Passed on.

        Raises:
            ValueError: `prefix_sharing` is neither true nor false.
        """
        check_flag("prefix_sharing", prefix_sharing)
        self.prefix_sharing = bool(prefix_sharing)
''': """\
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.prefix_sharing = True
""",
            """\
        self._no_sharing = "prefix_sharing=false"
        self._request_type = "loglikelihood"
""": """\
        self._no_sharing = ""
""",
            """\
        self.token_counts.prompt += sum(
            min(len(context) + len(continuation), self.max_length + 1)
            for _, context, continuation in requests
        )
""": "",
            """\
        path = self.answer_paths.of(self._request_type)
""": "",
            """\
            path.add("shared", len(shared), len(work.tree))
""": """\
            eval_logger.info(
                "%d requests share their prefixes: %d tokens are computed instead of %d.",
                len(shared),
                len(work.tree),
                sum(map(self._input_length, shared)),
            )
""",
            """\
            answers, computed = self._score_plainly(rest, disable_tqdm, override_bs)
            plain_answers = iter(answers)
            path.add("plain", len(rest), computed, filter(None, reasons))
""": """\
            why = "; ".join(dict.fromkeys(filter(None, reasons)))
            eval_logger.info("%d requests are computed whole: %s.", len(rest), why)
            plain_answers = iter(
                super()._loglikelihood_tokens(
                    rest, disable_tqdm=disable_tqdm, override_bs=override_bs
                )
            )
""",
            "            self.token_counts.processed += stop - begin\n": "",
            """\
        begin = 0
        for stop in self._passes(""": """\
        for stop in self._passes(""",
            "            begin = stop\n": "",
            "forward = Forward.of(self, len(tree))\n": "forward = Forward.of(self)\n",
            "        self.answer_paths.note_packing(bool(forward.packs))\n": "",
        },
    ),
    "forward": Rules(
        # Private to PyTorch.
        change={
            "            stack.enter_context(fast_cpu_linears(self.model, self.packs))\n": "",
            "        packs: Its packed weights, if any.\n": "",
            "        packs: Packs | None = None,\n": "",
            "        self.packs = packs or {}\n": "",
            "def of(cls, lm: Any, tokens: int)": "def of(cls, lm: Any)",
            """\
 as `HFLM` does.

        Args:
            lm: The `HFLM`.
            tokens: About how many go through the model. The weights must not change until then.
        \"""
        packs = (
            pack_linears(lm.model, tokens) if lm.mixed_precision_dtype is None else {}
        )
""": """\
 as `HFLM` does.\"""
""",
            "lm.mixed_precision_dtype, packs)": "lm.mixed_precision_dtype)",
        }
    ),
    "prefix_pass": Rules(
        # Attention in blocks on a CPU: much code for a tenth of the time.
        change={
            """\
    mask = additive_mask(~seen, dtype)
    if rows == 1 and device.type == "cpu" and width > _BLOCK_QUERIES:
        return _BlockMask.cut(mask, tree, pack, cached)
    return mask
""": "    return additive_mask(~seen, dtype)\n",
        },
    ),
    "masks": Rules(
        # One copy of a mask for each card, not for each layer on it: for the few who need it.
        change={
            "rows begin at multiples of `ALIGNMENT`. Sent to\n"
            "        another device, it is copied once; see `SentOnce`.": "rows begin at multiples of `ALIGNMENT`.",
            "    return SentOnce.of(whole, keys)\n": "    return whole[..., :keys]\n",
            "dtype: torch.dtype) -> SentOnce:": "dtype: torch.dtype) -> torch.Tensor:",
        }
    ),
    "memory": Rules(
        # accelerate has it from 1.1 on.
        change={
            "clear_device_cache(garbage_collection=True)": "release_memory()",
            "import clear_device_cache, should": "import release_memory, should",
        }
    ),
    "attention_support": Rules(
        # The adapters that are common; and transformers 4 calls it rope_scaling.
        change={
            "if kind not in _TOKEN_BY_TOKEN:": (
                'if kind not in ("ADALORA", "IA3", "LOHA", "LOKR", "LORA"):'
            ),
            """\
    rope = getattr(config, "rope_parameters", None) or {}
    if "mrope""": """\
    if "mrope""",
            'if "mrope_section" in rope:': 'if "mrope_section" in _rope_parameters(config):',
            """\
    rope = getattr(config, "rope_parameters", None) or {}
    scalings = (
""": """\
    rope = _rope_parameters(config)
    scalings = (
""",
            """\
        if scaling.get("rope_type") in ("dynamic", "longrope"):
""": """\
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind in ("dynamic", "longrope"):
""",
            """\
def trial_disagrees(
""": """\
def _rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    # transformers 4 calls them so.
    return (
        getattr(config, "rope_parameters", None)
        or getattr(config, "rope_scaling", None)
        or {}
    )


def trial_disagrees(
""",
        }
    ),
}


def sources() -> dict[str, str]:
    """Return the texts of the modules by their paths."""
    return merge(
        ROOT / "model_wrappers" / "batching",
        TARGETS,
        [("prefix_sharing", "PrefixHFLM"), ("prefix_sharing", "eval_logger")],
        RULES,
    )


def write(root: Path) -> None:
    """Add the modules, their test, the name of the model type and a section of the README."""
    for path, text in sources().items():
        (root / path).write_text(text, encoding="utf-8")
    copy(TEST, root)
    register(root, "hf-prefix", "lm_eval.models.hf_prefix:PrefixHFLM")
    describe(root, "hf_prefix.md")


PATCH = Patch(
    branch="hf-prefix",
    title="feat(models): hf-prefix computes what requests have in common once",
    write=write,
    tests=(TEST,),
)
