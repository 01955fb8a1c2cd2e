"""A review beside a notebook."""

import urllib.error
import urllib.request

import pytest

pytest.importorskip("starlette", reason="The extra `review` is not installed.")

from anomalib_metarefine import review
from anomalib_metarefine.curation.curate import Curation
from tests.curation.made_up import make


def test_a_notebook_goes_on_while_the_page_is_served(tmp_path):
    Curation(*make(tmp_path / "images")).write(tmp_path / "out")
    running = review(tmp_path / "out", by="me")
    try:
        with urllib.request.urlopen(running.address, timeout=20) as answer:
            assert b"<title>Review: line &lt;7&gt;</title>" in answer.read()
        assert f'href="{running.address}"' in running._repr_html_()
        assert running.session.standing().total == 13
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(running.address.rsplit("/", 2)[0] + "/guess/", timeout=20)
    finally:
        running.stop()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(running.address, timeout=20)
