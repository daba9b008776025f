"""Texts and the documents in them: the same for everyone, no more than there is, and apart from each other."""

from itertools import pairwise

import pytest
from evaluated import PROSE, subject

from zm_mlx.errors import UserError
from zm_mlx.evaluation import texts
from zm_mlx.evaluation.documents import documents, line_after
from zm_mlx.evaluation.texts import Text

CODE = "\n\n".join(f"def function_{i}(x):\n    y = x + {i}\n    return y * {i % 7}" for i in range(900))
BOTH = [Text("a", "prose", PROSE), Text("b", "code", CODE)]


def encode(text):
    return subject().encode(text)


def test_a_folder_is_read_in_the_order_of_names_and_only_what_is_text(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.py", "d.html", "e.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"<p>{name}</p>")
    found = texts.read([str(tmp_path)])
    assert [(t.text, t.kind) for t in found] == [
        ("<p>a.md</p>", "prose"),
        ("<p>b.txt</p>", "prose"),
        ("d.html", "prose"),
        ("<p>sub/c.py</p>", "code"),
    ]


def test_a_file_of_any_suffix_is_read_if_it_is_named(tmp_path):
    (tmp_path / "notes").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert texts.read([str(tmp_path / "notes")])[0].text == "one\ntwo"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "no such file or folder"),
        (lambda p: p.write_bytes(b"a\0b"), "binary file"),
        (lambda p: p.write_text(" \n"), "no text in it"),
        (lambda p: p.mkdir(), "no text in it"),
    ],
)
def test_what_cannot_be_read_names_the_flag_and_the_path(tmp_path, make, words):
    path = tmp_path / "x.txt"
    make(path)
    with pytest.raises(UserError, match=words) as error:
        texts.read([str(path)])
    assert str(error.value).startswith(f"--texts {path}")


def test_a_page_is_its_paragraphs_without_what_surrounds_them():
    page = """<html><head><title>No</title><style>p {}</style></head><body><nav><a>Menu</a></nav>
    <h1>Title &amp; more</h1><p>One <b>bold</b> word,
    and another.</p><ul><li>first<li>second</ul><pre>def f():
    return  1</pre><script>x < y</script></body></html>"""
    assert texts.plain(page).split("\n\n") == [
        "Title & more",
        "One bold word, and another.",
        "first",
        "second",
        "def f():\n    return  1",
    ]


def test_the_default_has_prose_and_code():
    assert {t.kind for t in texts.default()} == {"prose", "code"}


# ---- documents


def test_documents_are_the_same_every_time_and_more_of_them_keep_the_first():
    few, many = (documents(BOTH, encode, n, 500) for n in (2, 6))
    assert many[:2] == few == documents(BOTH, encode, 2, 500)
    assert [d.name for d in many] == ["prose 0", "code 0", "prose 1", "code 1", "prose 2", "code 2"]
    assert len({d.digest for d in many}) == 6


def test_windows_have_the_length_asked_for_and_differ_by_document_and_seed():
    found = documents(BOTH, encode, 4, 500)
    windows = {(d.name, seed): tuple(d.window(encode, 500, seed)) for d in found for seed in range(3)}
    assert all(len(w) == 500 for w in windows.values())
    assert len(set(windows.values())) == 12
    assert found[0].window(encode, 500, 2) == list(windows["prose 0", 2])


@pytest.mark.parametrize("seed", range(3))
def test_documents_of_a_kind_do_not_overlap(seed):
    found = documents([BOTH[0]], encode, 16, 500)
    windows = [subject().tokenizer.decode(d.window(encode, 500, seed)) for d in found]
    spans = sorted((begin := PROSE.find(w[:60]), begin + len(w)) for w in windows)
    assert spans[0][0] >= 0 and spans[-1][1] <= len(PROSE)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


@pytest.mark.parametrize(
    ("count", "tokens", "words"),
    [(1000, 500, "--documents 1000: the texts have room for"), (1, 10**6, "--prompt-tokens")],
)
def test_texts_that_are_too_short_are_said_with_what_to_do(count, tokens, words):
    with pytest.raises(UserError, match=words) as error:
        documents(BOTH, encode, count, tokens)
    assert "give" in str(error.value)


def test_windows_begin_with_a_paragraph_a_line_or_a_word():
    assert line_after("ab cd\nef\n\ngh", 1) == 10
    assert line_after("ab cd\nef", 1) == 6
    assert line_after("ab cd", 1) == 3
    assert line_after("abcd", 1) == 1 and line_after("abcd", 0) == 0
