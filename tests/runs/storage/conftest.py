"""For runs and models on stores."""

from __future__ import annotations

import pytest


@pytest.fixture
def working_root(tmp_path, monkeypatch):
    """This machine's working folder; another one is another machine."""
    monkeypatch.setenv("RLHF_RAY_WORKING_FOLDER", str(tmp_path / "work"))
    return tmp_path / "work"
