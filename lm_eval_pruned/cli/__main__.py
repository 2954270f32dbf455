"""``python -m lm_eval_pruned.cli``, where the command is not on the path."""

from lm_eval_pruned.cli import main


if __name__ == "__main__":
    raise SystemExit(main())
