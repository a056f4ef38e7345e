"""The built-in text is in two parts that share nothing; the user's own is read or refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from advisor.calibration import corpora
from advisor.calibration.corpora import builtin_corpus, builtin_documents, load_corpus
from advisor.errors import InputError


def shingles(documents: tuple[str, ...], words: int) -> set[tuple[str, ...]]:
    """Every run of words, also across the documents' ends."""
    split = " ".join(documents).split()
    return {tuple(split[start : start + words]) for start in range(len(split) - words + 1)}


def test_the_builtin_parts_share_no_sixteen_words_in_a_row() -> None:
    calibration, evaluation = (
        shingles(builtin_corpus(part).documents, 16) for part in ("calibration", "evaluation")
    )
    assert len(calibration) > 30_000
    assert len(evaluation) > 15_000
    assert not calibration & evaluation


@pytest.mark.parametrize("kind", corpora.KINDS)
def test_the_parts_of_other_kinds_share_no_sixteen_words_either(kind: str) -> None:
    texts = [builtin_corpus(f"{kind}-{part}").documents for part in ("calibration", "evaluation")]
    calibration, evaluation = (shingles(documents, 16) for documents in texts)
    assert len(calibration) > 15_000
    assert len(evaluation) > 5_000
    assert not calibration & evaluation
    for part in ("calibration", "evaluation"):
        assert not calibration & shingles(builtin_corpus(part).documents, 16)


@pytest.mark.parametrize("name", corpora.BUILTIN_TEXTS)
def test_the_rule_puts_every_topic_where_it_stands(name: str) -> None:
    part = name.rpartition("-")[2]
    documents = builtin_documents(name)
    assert {corpora.builtin_part(topic) for topic in documents} == {part}
    assert all(text.strip() for text in documents.values())


def test_the_builtin_text_never_changes() -> None:
    # Plans name these hashes: a changed text would make every plan before it irreproducible.
    assert builtin_corpus("calibration").sha256 == (
        "fa073ecda96ddd11bddd757fca79ec0dab682c0292b7a1a4e82c28d2db943416"
    )
    assert builtin_corpus("evaluation").sha256 == (
        "699df3f1375d4bc6e7b825c2adb28eabe95d6ac185ad38e183fd29cce90f448a"
    )
    kinds = {
        f"{kind}-{part}": builtin_corpus(f"{kind}-{part}").sha256[:16]
        for kind in corpora.KINDS
        for part in ("calibration", "evaluation")
    }
    assert kinds == {
        "facts-calibration": "c6eb2d851779ef1f",
        "facts-evaluation": "88f88ba9455f43e6",
        "fiction-calibration": "91d28ca032e1f242",
        "fiction-evaluation": "3f96f909e5b69a49",
        "languages-calibration": "b1a95a566a05cff6",
        "languages-evaluation": "58f9e30dc674a3fa",
    }


def test_the_built_in_texts_are_small_and_say_where_they_are_from() -> None:
    folder = Path(corpora.__file__).parent / "texts"
    assert {path.stem for path in folder.glob("*.txt")} == set(corpora.BUILTIN_TEXTS)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_500_000
    sources = (folder / "SOURCES.md").read_text(encoding="utf-8")
    assert all(f"{kind}-*.txt" in sources for kind in corpora.KINDS)


def test_a_built_in_text_that_is_none_is_refused_before_anything_is_read() -> None:
    with pytest.raises(InputError, match="Did you mean 'facts-calibration'"):
        corpora.check_place("builtin:facts-calibratoin")
    corpora.check_place("builtin:facts-calibration")


def test_about_a_third_is_for_evaluation() -> None:
    calibration, evaluation = (
        sum(map(len, builtin_corpus(part).documents)) for part in ("calibration", "evaluation")
    )
    assert 0.30 < evaluation / (calibration + evaluation) < 0.37


def test_builtin_by_name_is_the_same_corpus() -> None:
    assert load_corpus("builtin:evaluation") == builtin_corpus("evaluation")


def test_the_hash_is_of_the_documents_and_where_they_end(tmp_path: Path) -> None:
    for name, text in (("one", "ab"), ("two", "c"), ("three", "a"), ("four", "bc")):
        (tmp_path / name).write_text(text)
    first = load_corpus([str(tmp_path / "one"), str(tmp_path / "two")])
    second = load_corpus([str(tmp_path / "three"), str(tmp_path / "four")])
    assert first.documents == ("ab", "c")
    assert first.sha256 != second.sha256
    assert first.sha256 == hashlib.sha256(bytes(7) + b"\2ab" + bytes(7) + b"\1c").hexdigest()


def test_a_folder_is_read_by_name_at_any_depth_and_only_its_text(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "c.txt").write_text("last")
    (tmp_path / "a.MD").write_text("first")
    (tmp_path / "b" / "x.jsonl").write_text('{"text": "second"}\n\n{"text": "third", "id": 3}\n')
    (tmp_path / "b" / "picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "blank.txt").write_text(" \n")
    assert load_corpus(str(tmp_path)).documents == ("first", "second", "third", "last")


def test_several_sources_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("own")
    corpus = load_corpus(["builtin:evaluation", str(tmp_path / "own.txt")])
    assert corpus.documents == (*builtin_corpus("evaluation").documents, "own")
    assert corpus.name == f"builtin:evaluation + {tmp_path / 'own.txt'}"


def test_line_ends_and_byte_order_marks_do_not_change_the_text(tmp_path: Path) -> None:
    (tmp_path / "unix").write_bytes("one\ntwo é\n".encode())
    (tmp_path / "windows").write_bytes("\ufeffone\r\ntwo é\r\n".encode())
    unix, windows = (load_corpus(str(tmp_path / name)) for name in ("unix", "windows"))
    assert unix.sha256 == windows.sha256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "no text"),
        ("blank.txt", b" \n\t\n", "no text"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "byte 3 of"),
        ("binary.txt", b"text\0more", "binary"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
        ("field.jsonl", b'{"content": "a"}\n', '"text"'),
        ("list.jsonl", b'["text"]\n', "line 1"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_corpus(str(tmp_path / name))
    assert name in str(error.value)


def test_missing_sources_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    sources = ["nowhere.txt", str(tmp_path / "folder"), "builtin:calibratoin"]
    with pytest.raises(InputError) as error:
        load_corpus(sources)
    message = str(error.value)
    assert message.startswith("3 problems:")
    assert "'nowhere.txt'" in message
    assert "folder" in message
    assert "Did you mean 'calibration'" in message


def test_no_source_and_a_source_given_twice_are_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        load_corpus([])
    with pytest.raises(InputError, match="2 times"):
        load_corpus(["builtin:evaluation", "builtin:evaluation"])


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(InputError, match="'training'"):
        builtin_corpus("training")
