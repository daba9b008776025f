"""Where prompts come from, and which tokens they become."""

import io
import sys
from types import SimpleNamespace

import pytest
from commands import TEMPLATE
from mlx_lm.utils import load_tokenizer

from zm_mlx import prompts
from zm_mlx.errors import UserError
from zm_mlx.flags import DEFAULT_MODEL
from zm_mlx.prompts import Chat

BOM = "\ufeff".encode()


@pytest.fixture(scope="module")
def plain():
    return load_tokenizer(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def chatty():
    return load_tokenizer(DEFAULT_MODEL, {"chat_template": TEMPLATE})


@pytest.fixture
def stdin(monkeypatch):
    """Standard input that holds some bytes at every read."""
    return lambda data: monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=lambda: data)))


def test_a_byte_order_mark_is_no_text(tmp_path, stdin):
    path = tmp_path / "prompt.txt"
    path.write_bytes(BOM + b"import os")
    stdin(BOM + b"import os")
    assert (
        prompts.read(None, str(path)) == prompts.read("-", None) == prompts.read("\ufeffimport os", None) == "import os"
    )


@pytest.mark.parametrize("data", [b"", b" \n\t", BOM, BOM + BOM, BOM + b"\n", b"\n" + BOM, "\u200b".encode()])
def test_what_shows_nothing_is_empty(tmp_path, stdin, data):
    path = tmp_path / "prompt.txt"
    path.write_bytes(data)
    stdin(data)
    for given in ((None, str(path)), ("-", None), (None, "-"), (data.decode(), None)):
        with pytest.raises(UserError, match="the prompt is empty"):
            prompts.read(*given)


@pytest.mark.parametrize("data", [b"\xff\xfea\0", b"a\xff", b"\xc3", b"\xed\xa0\x80", b"text\0text"])
def test_bytes_that_are_no_text_are_refused(tmp_path, stdin, data):
    path = tmp_path / "prompt.txt"
    path.write_bytes(data)
    stdin(data)
    for given in ((None, str(path)), ("-", None), (None, "-")):
        with pytest.raises(UserError, match="text"):
            prompts.read(*given)


def test_undecodable_bytes_of_the_command_line_are_refused():
    with pytest.raises(UserError, match="--prompt: not text in UTF-8"):
        prompts.read("a\udc80b", None)


def test_standard_input_that_is_closed_is_said(monkeypatch, stdin):
    closed = io.BytesIO()
    closed.close()
    for stream in (None, SimpleNamespace(buffer=closed)):
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(UserError, match="standard input"):
            prompts.read("-", None)
        with pytest.raises(UserError, match="--prompt-file -: standard input"):
            prompts.read(None, "-")


def test_a_continued_prompt_has_no_second_beginning_of_sequence(plain, chatty):
    start = plain.bos_token_id
    assert prompts.encode(plain, "def f(", Chat())[0] == start
    for tokenizer in (plain, chatty):
        assert prompts.encode_open(tokenizer, "import os\n").count(start) == 1
        assert start not in prompts.encode_rest(tokenizer, "def f(", Chat())


def test_an_open_prompt_ends_without_an_end_of_sequence(plain):
    ending = SimpleNamespace(
        has_chat_template=False,
        encode=lambda text, add_special_tokens=True: [0, 7, 8, 1] if add_special_tokens else [7, 8],
    )
    assert prompts.encode_open(ending, "x") == [0, 7, 8]
    assert prompts.encode_open(plain, "import os") == plain.encode("import os")


@pytest.mark.parametrize("chat", [Chat(), Chat(response="Yes"), Chat(options={"think": "no"})])
def test_saved_opening_and_rest_are_the_whole_prompt(chatty, chat):
    whole = prompts.encode(chatty, "import os\ndef f(", chat)
    opening, rest = prompts.encode_open(chatty, "import os\n"), prompts.encode_rest(chatty, "def f(", chat)
    assert chatty.decode(opening).endswith("import os") or chatty.decode(opening).endswith("import os\n")
    assert chatty.decode(whole).endswith(chatty.decode(rest)) and "def f(" in chatty.decode(rest)


def test_options_that_change_the_saved_opening_are_refused(chatty):
    with pytest.raises(UserError, match=r"--chat-template-config changes .* --prompt-cache-file"):
        prompts.encode_rest(chatty, "def f(", Chat(options={"tone": "rude"}))
    assert "(no)" in chatty.decode(prompts.encode_rest(chatty, "def f(", Chat(options={"think": "no"})))


def test_a_template_that_hides_the_prompt_cannot_go_on():
    hiding = load_tokenizer(DEFAULT_MODEL, {"chat_template": "{{ messages[-1]['content'] | upper }}"})
    with pytest.raises(UserError, match="--prompt-cache-file: this chat template"):
        prompts.encode_rest(hiding, "def f(", Chat())


def test_a_template_that_raises_or_gives_surrogates_is_one_line(chatty):
    raising = load_tokenizer(DEFAULT_MODEL, {"chat_template": "{{ raise_exception('no system role') }}"})
    with pytest.raises(UserError, match="no system role"):
        prompts.encode(raising, "x", Chat(system="y"))
    with pytest.raises(UserError, match="not text in UTF-8"):
        prompts.encode(chatty, "x", Chat(options={"tone": "\ud800"}))


@pytest.mark.parametrize("chat", [Chat(system="x"), Chat(response="x"), Chat(options={"x": 1})])
@pytest.mark.parametrize("encode", [prompts.encode, prompts.encode_rest])
def test_what_needs_a_template_is_refused_without_one(plain, chatty, chat, encode):
    with pytest.raises(UserError, match="needs a chat template"):
        encode(plain, "x", chat)
    ignoring = Chat(chat.system, chat.response, chat.options, ignore=True)
    with pytest.raises(UserError, match="needs a chat template"):
        encode(chatty, "x", ignoring)


def test_a_prompt_of_which_a_tokenizer_makes_nothing_is_empty():
    dropping = SimpleNamespace(has_chat_template=False, encode=lambda *_, **__: [])
    for encode in (
        prompts.encode,
        prompts.encode_rest,
        lambda tokenizer, text, _: prompts.encode_open(tokenizer, text),
    ):
        with pytest.raises(UserError, match="the prompt is empty"):
            encode(dropping, "x", Chat())
