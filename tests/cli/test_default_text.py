from __future__ import annotations

from lm_eval_pruned import cli
from lm_eval_pruned.pruning.arguments import OWN_TEXT


def test_sensitivity_needs_no_text(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ["sensitivity", "--model_args", f"pretrained={tiny_llama}"]
    words += ["--criteria", "maw", "--prune_percents", "50"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert cli.main([*words, "--calibration", str(OWN_TEXT)]) == 0
    assert capsys.readouterr().out == out
    assert "on 16 texts" in out
