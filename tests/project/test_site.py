"""Pages of the documentation load nothing from another host."""

import runpy
from types import SimpleNamespace

import pytest

from tests.helpers.checkpoints import ROOT


@pytest.mark.parametrize(
    "fetched",
    [
        "<img alt='' src='//images.example/a.png'>",
        '<script async src="https://cdn.example/a.js"></script>',
        '<link rel="stylesheet" href="https://fonts.example/css">',
    ],
)
def test_a_page_that_loads_from_another_host_is_refused(fetched):
    hook = runpy.run_path(str(ROOT / "docs" / "site_hooks.py"))["on_post_page"]
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    harmless = '<a href="https://arxiv.org">x</a><img src="a.svg"><script>1</script>'
    assert hook(harmless, page=page) == harmless
    with pytest.raises(ValueError, match="another host"):
        hook(harmless + fetched, page=page)
