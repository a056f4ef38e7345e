"""The catalogue's lists say what can be calculated of every model."""

from __future__ import annotations

from advisor.cli import output, profiles
from advisor.plan.data import set_extra_folders
from advisor.workflows import list_profiles, show_profile


def test_every_model_has_its_number_of_parameters():
    rows = {row["id"]: row for row in list_profiles("models")["models"]}
    assert len(rows) > 70
    assert [row["id"] for row in rows.values() if not row["parameters"]] == []
    # As the publishers count them.
    assert rows["Qwen/Qwen3-8B"]["parameters"] == 8_190_735_360
    assert round(rows["mistralai/Mixtral-8x7B-v0.1"]["parameters"] / 1e9, 1) == 46.7


def test_a_model_of_unknown_shapes_is_listed_with_the_reason(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "me--odd.yaml").write_text(
        "id: me/odd\nconfig: {architectures: [OddForCausalLM], model_type: odd}\nsources: [me]\n"
    )
    set_extra_folders((tmp_path,))
    try:
        document = list_profiles("models")
    finally:
        set_extra_folders(())
    (odd,) = [row for row in document["models"] if row["id"] == "me/odd"]
    assert odd["parameters"] is None
    assert "OddForCausalLM" in odd["note"]
    profiles._render_list(output.console(), document)
    shown = capsys.readouterr().out
    assert "8.19 B parameters" in shown
    assert "135 M parameters" in shown


def test_a_profile_is_shown_by_an_everyday_name():
    assert show_profile("gemma3-4b")["profile"]["id"] == "google/gemma-3-4b-it"
