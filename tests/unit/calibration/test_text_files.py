"""Files as people have them: compressed, cut, of other kinds, far too large; and what is said."""

from __future__ import annotations

import gzip
import itertools
import json

import pytest

from advisor.calibration import text_files
from advisor.calibration.corpora import load_corpus
from advisor.calibration.text_files import MOST_BYTES, PARTS
from advisor.errors import InputError


def render(messages, tools):
    """A chat template that shows all it gets."""
    for message in messages:
        assert message["content"] is None or isinstance(message["content"], str)
    said = "".join(f"<{message['role']}>{message['content']}" for message in messages)
    return f"{[tool['name'] for tool in tools or []]}{said}"


def lines(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return str(path)


def test_messages_of_every_kind_become_one_text_each(tmp_path):
    parts = [{"type": "text", "text": "see "}, "this", {"type": "text", "text": "!"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    path = lines(
        tmp_path / "chat.jsonl",
        {
            "messages": [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": parts},
            ]
        },
        {"messages": [call, {"role": "tool", "content": "42"}], "tools": [{"name": "add"}]},
        {"text": "plain", "messages": []},
    )
    assert load_corpus(path, render).documents == (
        "[]<system>be kind<user>see this!",
        "['add']<assistant>None<tool>42",
        "plain",
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
        ({"messages": [{"role": "user", "content": [7]}]}, "'a int'"),
        ({"messages": [{"role": "user", "content": {"text": "a"}}]}, "it is a dict"),
        ({"messages": [{"from": "human", "value": "hi"}]}, '"role"'),
        ({"messages": ["hi"]}, '"role"'),
        ({"messages": [{"role": "user", "content": "a"}], "tools": "add"}, "a str"),
        ({"conversations": [{"from": "human"}]}, "its keys are conversations"),
        ({"text": ["a"]}, "its keys are text"),
    ],
)
def test_conversations_that_cannot_be_read_are_refused_by_line(tmp_path, record, message):
    path = lines(tmp_path / "chat.jsonl", {"text": "a"}, record)
    with pytest.raises(InputError, match=message) as error:
        load_corpus(path, render)
    assert "line 2 of" in str(error.value)


def test_a_template_that_refuses_is_named_with_its_line(tmp_path):
    def no_system(messages, tools):
        raise ValueError("System role not supported")

    path = lines(tmp_path / "chat.jsonl", {"messages": [{"role": "system", "content": "a"}]})
    with pytest.raises(InputError, match=r"refuses line 1 of .*: System role not supported"):
        load_corpus(path, no_system)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL"])
def test_empty_lines_and_line_ends_of_every_kind(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b'\r\n{"text": "one\\r\\ntwo"}\r\n \r\n{"text": "three"}\n\n')
    assert load_corpus(str(path)).documents == ("one\r\ntwo", "three")


@pytest.mark.parametrize("content", ["", "\n \n", '{"text": " "}\n'])
def test_json_lines_without_text_are_said_to_have_none(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match="has no text: it is empty or blank"):
        load_corpus(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("grüße\n".encode("utf-16"), "UTF-16: convert it with iconv -f UTF-16 "),
        ("grüße\n".encode("utf-16-le"), "UTF-16: convert it with iconv -f UTF-16LE "),
        ("abc grüße\n".encode("latin-1"), r"byte 6 of .* \(0xfc\).*iconv -f LATIN1 -t UTF-8 "),
        (gzip.compress(b"text"), "compressed with gzip: name it .gz"),
        (b"\x28\xb5\x2f\xfd....", "compressed with zstd"),
        (b"BZh9....", "compressed with bzip2"),
        (b"PK\x03\x04....", "an archive"),
        (b"PAR1....", "a Parquet table"),
        (b"%PDF-1.7 ....", "a PDF"),
        (b"ELF\0......", "a binary file"),
    ],
)
def test_what_is_no_utf8_is_said_to_be_what_it_is(tmp_path, content, message):
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_corpus(str(path))
    assert str(path) in str(error.value)


def test_compressed_files_are_read_alone_and_in_folders(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt.gz").write_bytes(gzip.compress("one é\n".encode()))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}\n{"text": "three"}'))
    (folder / "c.tar.gz").write_bytes(gzip.compress(b"an archive"))
    assert load_corpus(str(folder)).documents == ("one é\n", "two", "three")
    assert load_corpus(str(folder / "b.jsonl.gz")).documents == ("two", "three")
    content = (folder / "a.txt.gz").read_bytes()
    for broken in (content[:-9], b"no gzip at all", content[:12] + b"\xff" * 9):
        (folder / "a.txt.gz").write_bytes(broken)
        with pytest.raises(InputError, match=r"a\.txt\.gz' is named as compressed with gzip, but"):
            load_corpus(str(folder))


def test_every_file_of_a_folder_that_is_no_text_is_named(tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.py").write_bytes(b"a\xff" if number % 2 else b"a = 1")
        (tmp_path / f"{number}.bin").write_bytes(bytes(range(256)))
    with pytest.raises(InputError) as error:
        load_corpus(str(tmp_path))
    message = str(error.value)
    assert message.startswith("4 problems:")
    assert all(f"{number}.py" in message for number in (1, 3, 5, 7))
    assert ".bin" not in message


@pytest.fixture
def small(monkeypatch):
    """Read 6400 bytes of a source, in 32 parts of 200."""
    monkeypatch.setattr(text_files, "MOST_BYTES", 6400)
    monkeypatch.setattr(text_files, "_FEWEST_BYTES", 1000)


def test_parts_from_all_over_are_read_of_much_text(tmp_path, small):
    # Characters of two bytes: half of all cuts would part one.
    (tmp_path / "a.txt").write_text("".join(f"{i:05}äöü" for i in range(2000)), encoding="utf-8")
    (tmp_path / "b.txt").write_text(
        "".join(f"{i:05}€" for i in range(2000, 3000)), encoding="utf-8"
    )
    documents = load_corpus(str(tmp_path)).documents
    assert sum(len(document.encode()) for document in documents) <= 6400
    assert sum(len(document.encode()) for document in documents) > 6400 - 6 * len(documents)
    whole = "".join((tmp_path / name).read_text(encoding="utf-8") for name in ("a.txt", "b.txt"))
    places = [whole.index(document) for document in documents]
    assert places == sorted(places)
    assert len(documents) in (PARTS, PARTS + 1)
    gaps = [after - before for before, after in itertools.pairwise(places)]
    assert max(gaps) < 1.7 * len(whole) / PARTS
    assert load_corpus(str(tmp_path)).sha256 == load_corpus(str(tmp_path)).sha256


@pytest.mark.parametrize("filler", [3, 120])
def test_lines_of_much_text_are_whole_and_read_once(tmp_path, small, filler):
    records = [{"text": f"{i} " + "ä" * (filler + i % 7)} for i in range(4000)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n",
                    encoding="utf-8")  # fmt: skip
    documents = load_corpus(str(path)).documents
    known = [record["text"] for record in records]
    places = [known.index(document) for document in documents]
    assert places == sorted(set(places)), "in order, none twice"
    assert (places[0], places[-1] > 3500) == (0, True)
    assert sum(len(document.encode()) for document in documents) > 3000


def test_a_line_that_begins_where_a_part_does_is_in_that_part_alone(tmp_path, small):
    # 40 bytes a line: parts of 200 bytes begin and end where lines do.
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "{i:027}"}}\n' for i in range(320)), encoding="utf-8")
    assert path.stat().st_size == 320 * 40
    documents = load_corpus(str(path)).documents
    expected = [f"{part * 10 + i:027}" for part in range(PARTS) for i in range(5)]
    assert list(documents) == expected


def test_records_larger_than_a_part_are_said(tmp_path, small):
    path = lines(tmp_path / "a.jsonl", *[{"text": "a" * 5000}] * 3)
    # The first and the third begin in a part; the second in none.
    assert load_corpus(path).documents == ("a" * 5000,) * 2
    path = lines(tmp_path / "b.jsonl", {"text": "a" * 90_000})
    with pytest.raises(InputError, match=r"no whole line of .*b\.jsonl"):
        load_corpus(path)


def test_the_beginning_of_much_compressed_text_is_read(tmp_path, small):
    path = tmp_path / "a.jsonl.gz"
    records = [{"text": f"{i:0100}"} for i in range(1000)]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    documents = load_corpus(str(path)).documents
    assert documents == tuple(record["text"] for record in records[: len(documents)])
    assert 6400 - 120 < 113 * len(documents) <= 6400


def test_of_a_huge_file_little_is_read(tmp_path):
    # Sparse: 2 GB, of which the disk holds the parts that are read.
    path, size = tmp_path / "huge.txt", 2 << 30
    with path.open("wb") as handle:
        handle.truncate(size)
        for part in range(PARTS):
            handle.seek(part * size // PARTS)
            handle.write(b"word " * (MOST_BYTES // PARTS // 5 + 1))
    corpus = load_corpus(str(path))
    assert sum(map(len, corpus.documents)) == MOST_BYTES
    assert len(corpus.documents) == PARTS
