"""Measure the unpruned model and pruned ones side by side: prefill and decode separately, at a
fixed and at the natural output length.
"""

import sys
from pathlib import Path

from lm_eval_pruned.cli import model_args as loading
from lm_eval_pruned.profiling.options import ProfileRequest, demo_prompts, read_prompts
from lm_eval_pruned.pruning.arguments import SEVERAL, SEVERAL_SIZES, option_row
from lm_eval_pruned.util.options import row


# fmt: off
OPTIONS = (
    loading.MODEL_ARGS,
    *(option_row(name, several=True) for name in SEVERAL_SIZES),
    option_row("criterion"),
    *ProfileRequest.rows(),
    row("--prompts", "FILE",
        '.txt with one prompt per line, or .jsonl with a key "prompt" (default: the demo set)'),
    row("--limit", "N", "use only the first N prompts", type=int),
    row("--device", None, "default: cuda if there is one, else cpu"),
    row("--output_path", "DIR", "folder to write", required=True),
)
# fmt: on


def run(arguments) -> int:
    """Measure, and write the profile after each repeat; return the exit code."""
    import torch

    from lm_eval_pruned.energy.meter import CodecarbonMeter, EnergyMonitor
    from lm_eval_pruned.profiling import report as profile_report
    from lm_eval_pruned.profiling.measure import profile

    model_args, folder = loading.read(arguments), Path(arguments.output_path)
    taken = {SEVERAL.get(option, option): option for option in vars(arguments)}
    for name in model_args.keys() & taken.keys():
        raise ValueError(
            f"{name}={model_args[name]} was given in --model_args: pass --{taken[name]} instead."
        )
    model_args = loading.with_default_model(model_args)
    file, limit = arguments.prompts, arguments.limit
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no prompt: pass at least 1.")
    prompts = (demo_prompts() if file is None else read_prompts(Path(file)))[:limit]
    sizes = {name: getattr(arguments, name) for name in (*SEVERAL_SIZES, "criterion")}
    request = ProfileRequest.of(
        ProfileRequest.parsed(arguments),
        "profile",
        pretrained=str(model_args.pop("pretrained")),
        **{name: value for name, value in sizes.items() if value is not None},
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=model_args.pop("dtype", None),
        load_arguments=model_args,
    )
    for so_far in profile(request, prompts, monitor=EnergyMonitor(CodecarbonMeter())):
        paths = profile_report.write(so_far, folder)
    print(profile_report.as_markdown(so_far))
    print(f"Written to {', '.join(map(str, paths))}.", file=sys.stderr)
    return 0
