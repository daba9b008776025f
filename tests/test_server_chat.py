"""The server with a chat template: what turns, repeats, other conversations and a saved prompt's followers reuse."""

import pytest
from commands import run, templated_model
from mlx_lm.utils import load_tokenizer
from served import serving

from zm_mlx import cache_prompt, server
from zm_mlx.flags import DEFAULT_MODEL

SYSTEM = "Answer in the words of a Python program.\n" + "\n".join(f"    line_{i} = {i * i}" for i in range(20))
SAVED = "import os\nimport sys\n\n\nclass Reader:\n" + "\n".join(f"    field_{i}: int = {i}" for i in range(20)) + "\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model with a chat template, and a prompt that was saved with it."""
    folder = tmp_path_factory.mktemp("chat")
    model = templated_model(folder / "model")
    (folder / "saved.txt").write_text(SAVED)
    file = str(folder / "saved.safetensors")
    flags = ["--model", model, "--prompt-file", str(folder / "saved.txt"), "--prompt-cache-file", file]
    assert cache_prompt.main([*flags, "--kv-budget", "96", "--prefill", "streaming"]) == 0
    return folder, model, file


@pytest.fixture(scope="module")
def chat(files):
    folder, model, file = files
    flags = ("--model", model, "--kv-budget", "96", "--max-kv-memory", "16MB", "--prompt-cache-file", file)
    with serving(folder, *flags) as running:
        yield running


def say(chat, *turns, system=SYSTEM, **more):
    """The answer to a conversation of a system prompt and turns by turns."""
    roles = ("user", "assistant")
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": roles[i % 2], "content": x} for i, x in enumerate(turns)]
    return chat.client.chat.completions.create(
        model="default_model", messages=messages, max_tokens=8, temperature=0, **more
    )


def cached(answer):
    return answer.usage.prompt_tokens_details.cached_tokens


def test_turns_repeats_and_other_conversations_reuse_what_they_share(chat):
    first = say(chat, "def f(")
    text = first.choices[0].message.content
    again = say(chat, "def f(")
    assert again.choices[0].message.content == text and cached(again) == again.usage.prompt_tokens - 1
    turn = say(chat, "def f(", text, "def g(")
    assert cached(turn) >= first.usage.prompt_tokens + first.usage.completion_tokens - 1
    other = say(chat, "class A:")
    assert 0 < cached(other) < first.usage.prompt_tokens - 1
    assert cached(say(chat, "def f(", text, "class B:")) > cached(other)  # an edited question


def test_a_prompt_after_a_kept_system_prompt_is_answered_as_without_it(chat):
    other = "Other rules.\n" + SYSTEM
    say(chat, "x = 1", system=other)
    with_it = say(chat, "for name in", system=other)
    assert cached(with_it) > 0
    once = say(chat, "for name in", system=other, stream=True, extra_body={"stream_options": {"include_usage": True}})
    assert "".join(c.choices[0].delta.content or "" for c in once if c.choices) == with_it.choices[0].message.content


def test_a_request_goes_on_from_the_saved_prompt(chat, files):
    tokens = len(load_tokenizer(files[1]).encode("<s><user>\n" + SAVED, add_special_tokens=False))
    answer = say(chat, SAVED + "class Writer:", system=None)
    assert cached(answer) == tokens
    repeated = say(chat, SAVED + "class Writer:", system=None)
    assert repeated.choices[0].message.content == answer.choices[0].message.content


def test_a_template_that_refuses_is_a_wrong_request(chat):
    status, _, text = chat.post(
        "/v1/chat/completions",
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}',
    )
    assert status == 400 and "text parts" in text
    assert chat.post("/v1/chat/completions", b'{"messages": [{"role": "tool"}], "tools": 3}')[0] == 400
    assert chat.get("/health")[0] == 200


def test_a_saved_prompt_that_does_not_say_its_tokens_is_refused(capsys, tmp_path, files):
    from zm_mlx.host.saved import read, save_prompt_cache

    found, metadata = read(files[2])
    old = str(tmp_path / "old.safetensors")
    save_prompt_cache(old, found, {name: x for name, x in metadata.items() if name != "tokens"})
    code, _, err = run(server.main, capsys, "--prompt-cache-file", old)
    assert code == 2 and "does not say its tokens" in err and "zm_mlx.cache_prompt" in err


def test_a_saved_prompt_of_another_model_is_refused(capsys, files):
    code, _, err = run(server.main, capsys, "--model", DEFAULT_MODEL, "--prompt-cache-file", files[2])
    assert code == 2 and "differs from the model" in err
