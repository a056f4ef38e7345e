"""What follows a search."""

from __future__ import annotations

import pytest

from advisor.cli.tune import apply_command


@pytest.mark.parametrize(
    ("named", "known_as", "needs"),
    [
        ("folder", "someone/model", True),  # models--someone--model/snapshots/COMMIT anywhere
        ("folder", "./folder", False),
        ("someone/model", "someone/model", False),
    ],
)
def test_a_download_outside_of_the_cache_is_named_again(
    tmp_path, monkeypatch, named, known_as, needs
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    document = {"plan_path": "my plan.yaml", "plan": {"model": {"id": known_as}}}
    command = apply_command(document, named)
    assert command.startswith("advisor apply 'my plan.yaml' -o quantized/")
    assert command.endswith(" --model folder") is needs
