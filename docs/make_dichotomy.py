"""Measure, collect and write the pages of the dichotomy: ``python docs/make_dichotomy.py``.

Without an option, or with ``--render``, ``docs/measurements/dichotomy.md``, ``dichotomy-tables.md`` beside
it and the figures are written from the tables in ``docs/measurements/dichotomy``, as are a table of `first_layer.md` and one of
`allocation.md` there. ``--collect`` brings what
the work folder holds into those tables before, ``--run`` runs the steps before that, and ``--list``
prints the commands of the steps and does nothing. Needs the extra ``report``; the page says what
the steps need.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import shutil
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from dichotomy.collecting import Collection, collect
from dichotomy.comparisons_page import tables_of_other_pages
from dichotomy.figures import draw
from dichotomy.page import page, tables_page
from dichotomy.steps import MODELS, STEPS, Setting, prepare, words_of
from dichotomy.words import read_tables

from lm_eval_pruned.util.atomic import write_atomically


PAGE = ROOT / "docs" / "measurements" / "dichotomy.md"
DETAILS = PAGE.with_name("dichotomy-tables.md")
TABLES = ROOT / "docs" / "measurements" / "dichotomy"
#: Around a table that stands on a page which is written by hand.
BEGIN = "<!-- drawn by docs/make_dichotomy.py -->\n\n"
END = "\n\n<!-- end -->"
STUDY = ROOT / "tests" / "data" / "study_benchmarks.csv"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_argument_group("what to do (default: --render)")
    what.add_argument("--list", action="store_true", help="print the commands")
    what.add_argument("--run", action="store_true", help="run the steps, then collect")
    what.add_argument(
        "--collect",
        action="store_true",
        help="bring what was measured (of --only) into the tables, then render",
    )
    what.add_argument(
        "--render", action="store_true", help="write the pages and their figures"
    )
    steps = parser.add_argument_group("steps")
    names = [step.name for step in STEPS]
    steps.add_argument(
        "--only", nargs="+", choices=names, metavar="STEP", help=", ".join(names)
    )
    steps.add_argument(
        "--output", type=Path, metavar="FOLDER", help="work folder for the sweeps"
    )
    steps.add_argument(
        "--data", type=Path, metavar="FILE.jsonl", help="text that is in no benchmark"
    )
    steps.add_argument("--model", choices=MODELS, default="smollm2")
    steps.add_argument(
        "--pretrained", help="name or folder of the model (default: the default model)"
    )
    steps.add_argument("--model_args", nargs="+", default=(), metavar="KEY=VALUE")
    steps.add_argument("--dtype", help="such as bfloat16 (default: the checkpoint's)")
    steps.add_argument("--device", help="such as cpu (default: what is there)")
    steps.add_argument("--batch_size", default="16")
    steps.add_argument("--samples", help="JSON or a file: documents per task, by index")
    steps.add_argument("--limit", help="documents per task, in place of --samples")
    steps.add_argument(
        "--max_steps",
        default="100",
        help="steps of each training, of 1,024 tokens each",
    )
    return parser


def main() -> int:
    """Do what the options say; the exit code is that of the first step that failed."""
    options = parser().parse_args()
    needs_folder = options.list or options.run or options.collect
    if needs_folder and options.output is None:
        sys.exit(
            "Steps are measured in a work folder outside of the repository: give --output."
        )
    if (
        options.model != "smollm2"
        and options.pretrained is None
        and (options.list or options.run)
    ):
        sys.exit(
            f"--model {options.model} is not the default model: give --pretrained."
        )
    if options.list or options.run:
        code = _steps(options)
        if code or options.list:
            return code
    if options.run or options.collect:
        # A step that ran may be one side of a comparison, or one seed of several.
        only = None if options.run else options.only
        collected = collect(options.output, only)
        collected.keep(read_tables(TABLES))
        for note in collected.notes:
            print(note, file=sys.stderr)
    else:
        collected = Collection()
        collected.keep(read_tables(TABLES))
    for name, content in collected.files().items():
        write_atomically(TABLES / name, content)
    render()
    return 0


def _steps(options: argparse.Namespace) -> int:
    setting = Setting(
        *(options.output.resolve(), options.model, options.pretrained),
        *(tuple(options.model_args), options.dtype, options.device, options.batch_size),
        *(options.samples, options.limit, options.max_steps),
    )
    if options.run:
        if options.data is None:
            sys.exit("The steps score and calibrate on text: give --data FILE.jsonl.")
        try:
            prepare(options.data, setting.folder)
        except (OSError, ValueError) as error:
            sys.exit(str(error))
    for step in STEPS:
        if options.model not in step.models or step.name not in (
            options.only or [step.name]
        ):
            continue
        words = words_of(step, setting)
        print(shlex.join(words), flush=True)
        done = step.profile and (Path(words[-1]) / "profile.json").is_file()
        if options.list or done:
            continue
        if step.adapters is not None:
            model = setting.folder / setting.model
            trained = model / step.adapters / "adapters"
            if trained.is_dir():
                shutil.copytree(
                    trained, model / step.name / "adapters", dirs_exist_ok=True
                )
        module = [sys.executable, "-m", "lm_eval_pruned.cli"]
        code = subprocess.run([*module, *words[1:]], check=False).returncode  # noqa: S603
        if code:
            return code
    return 0


def render() -> None:
    """Write the pages and their figures from the tables."""
    tables = read_tables(TABLES)
    figures = draw(tables)
    for name, drawing in figures.items():
        write_atomically(TABLES / name, drawing)
    with STUDY.open(encoding="utf-8", newline="") as lines:
        study = list(csv.DictReader(lines))
    write_atomically(PAGE, page(tables, study, sorted(figures)))
    write_atomically(DETAILS, tables_page(tables))
    for name, table in tables_of_other_pages(tables).items():
        file = PAGE.with_name(name)
        before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        write_atomically(file, f"{before}{BEGIN}{table}{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
