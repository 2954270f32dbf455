"""A readable end for IFEval runs on machines without NLTK's sentence tokenizer.

lm-evaluation-harness tries to download ``punkt_tab`` when its IFEval code is
imported. Without a network that fails quietly, all responses are generated, and
the run ends in a traceback when the first sentence has to be counted. The groups
of this folder that contain ``ifeval`` set its `process_docs` to `require_punkt`,
which looks before anything is generated.

The harness loads this file by its path, so it imports nothing from the package.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar


if TYPE_CHECKING:
    from collections.abc import Iterable

    Documents = TypeVar("Documents", bound=Iterable[dict[str, Any]])

PUNKT_INSTRUCTIONS = frozenset(
    {
        "change_case:capital_word_frequency",
        "length_constraints:number_sentences",
    }
)
"""The instruction types that the harness checks with NLTK's ``punkt_tab``."""


class MissingNLTKDataError(SystemExit, LookupError):
    """NLTK's ``punkt_tab`` is needed and cannot be found.

    As a `LookupError` it can be caught like any error; where nothing catches it,
    Python prints only its message, without a traceback, and exits with status 1,
    because it is a `SystemExit` too.
    """


def punkt_is_installed() -> bool:
    """Return whether NLTK can split English sentences, without downloading."""
    from nltk.tokenize import sent_tokenize

    try:
        sent_tokenize("One. Two.")
    except (LookupError, OSError):
        return False
    return True


def require_punkt(docs: Documents) -> Documents:
    """Return `docs` unchanged if each of them can be scored on this machine.

    Args:
        docs: Rows with IFEval's column ``instruction_id_list``.

    Raises:
        MissingNLTKDataError: A row has one of `PUNKT_INSTRUCTIONS` and NLTK lacks
            ``punkt_tab``. Only the first process of a machine raises it, since
            the harness lets only that one download, and the others may look
            before it is done.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0" or punkt_is_installed():
        return docs
    used = {name for doc in docs for name in doc["instruction_id_list"]}
    needed = sorted(PUNKT_INSTRUCTIONS & used)
    if needed:
        raise MissingNLTKDataError(
            f"Scoring IFEval's {' and '.join(needed)} takes the NLTK resource "
            "punkt_tab, which was not found: run `python -m nltk.downloader "
            "punkt_tab` where there is a network, or set NLTK_DATA to a folder that "
            "contains tokenizers/punkt_tab."
        )
    return docs
