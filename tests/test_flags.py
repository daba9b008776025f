"""Values that flags take: what is out of range is one line with the flag and the range, before the model loads."""

import importlib
import json
import math

import mlx.core as mx
import pytest
from commands import run, templated_model
from mlx_lm.sample_utils import make_sampler

from zm_mlx import cache_prompt, generate
from zm_mlx.engine import Settings
from zm_mlx.flags import DEFAULT_MODEL
from zm_mlx.sampling import RANGES, Sampling


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    """No model is loaded: everything here is refused before."""

    def load(_):
        raise AssertionError("the model was loaded")

    for module in (generate, cache_prompt):
        monkeypatch.setattr(module, "load_model", load)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def refused(capsys, *argv, door=generate):
    code, out, err = run(door.main, capsys, *argv)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"{door.__name__}: error: ")
    return err


OUTSIDE = {
    "--temp": ("from 0.001 up", ["nan", "inf", "-inf", "-nan", "-1", "-1e5", "1e-300", "0.0001", "1e400", "x", ""]),
    "--top-p": ("from 0.000001 to 1", ["1.5", "-1", "nan", "inf", "1e-300", "-1e-5"]),
    "--min-p": ("from 0 (off) to 1", ["2", "-0.1", "nan", "inf"]),
    "--top-k": ("from 0 (off) up", ["-3", "-1", "1.5", "nan", "1e3", "9" * 30, "9" * 5000]),
    "--xtc-probability": ("from 0 (off) to 1", ["2", "-1", "nan"]),
    "--xtc-threshold": ("from 0 to 0.5", ["0.9", "-0.1", "nan"]),
    "--min-tokens-to-keep": ("from 1 to the size", ["0", "-1", "1.5", "9" * 30]),
    "--seed": ("from 0 to 18446744073709551615", ["-1", str(2**64), "9" * 30, "1.5", "", "nan"]),
    "--max-tokens": ("from 1 up, or -1", ["0", "-2", "1.5", "nan", "9" * 5000, ""]),
    "--prefill-step-size": ("from 1 up", ["0", "-1", "nan", "9" * 30]),
}


@pytest.mark.parametrize(("flag", "value"), [(f, v) for f, (_, values) in OUTSIDE.items() for v in values])
def test_a_number_out_of_range_names_the_flag_and_the_range(capsys, flag, value):
    err = refused(capsys, "--temp", "1", flag, value)
    assert f"error: {flag} must be " in err and OUTSIDE[flag][0] in err and len(err) < 200


@pytest.mark.parametrize("flag", ["--top-k", "--min-tokens-to-keep"])
@pytest.mark.parametrize("value", ["2049", "100000000"])
def test_more_tokens_than_the_vocabulary_has_are_refused_before_the_weights(capsys, flag, value):
    err = refused(capsys, "--temp", "1", flag, value)
    assert f"{flag} must be" in err and ("2048," in err or "2047," in err)


@pytest.mark.parametrize("token", ["xyz", "", "-5", "99999", "2048", "9" * 5000, "two words"])
def test_an_end_of_sequence_that_is_no_token_is_refused_before_the_weights(capsys, token):
    assert "--extra-eos-token" in refused(capsys, "--extra-eos-token", "def", token)


@pytest.mark.parametrize("token", ["xyz", "", "two words"])
def test_an_end_of_sequence_that_transformers_would_invent_is_refused(capsys, tmp_path, token):
    argv = ["--prompt", "x", "--prompt-cache-file", str(tmp_path / "a.safetensors"), "--eos-token", token]
    assert "--eos-token" in refused(capsys, *argv, door=cache_prompt)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{bad", "JSON object"),
        ("", "JSON object"),
        ("[1]", "JSON object"),
        ("null", "JSON object"),
        ("3", "JSON object"),
        ("[" * 100_000, "JSON object"),
        *((json.dumps({name: False}), name) for name in ("add_generation_prompt", "continue_final_message")),
        *((json.dumps({name: []}), name) for name in ("messages", "conversation", "tokenize", "return_dict")),
        ('{"x": 1}', "needs a chat template"),
    ],
)
def test_a_template_config_that_cannot_be_is_refused(capsys, text, words):
    err = refused(capsys, "--chat-template-config", text)
    assert "--chat-template-config" in err and words in err


@pytest.mark.parametrize(
    "options", [{"tools": 5}, {"chat_template": "{{ x.y.z }}"}, {"return_assistant_tokens_mask": True}]
)
def test_what_a_chat_template_refuses_is_one_line(capsys, tmp_path, options):
    model = templated_model(tmp_path / "model")
    assert "chat template" in refused(capsys, "--model", model, "--chat-template-config", json.dumps(options))


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["--quantized-kv-start", "5000"], "--quantized-kv-start"),
        (["--max-kv-size", "0"], "--max-kv-size"),
        (["--image", "a.png"], "--image"),
        (["-qa"], "--quantize-activations"),
    ],
)
def test_a_refused_flag_is_refused_whatever_its_value(capsys, argv, name):
    assert f"{name} does not work here: " in refused(capsys, *argv)


@pytest.mark.parametrize("door", [generate, cache_prompt])
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--kv-bits", "6"], "--kv-bits must be 8 or 4, not 6"),
        (["--kv-bits", "eight"], "--kv-bits must be 8 or 4, not 'eight'"),
        (["--kv-bits", "8", "--kv-group-size", "48"], "--kv-group-size must be 64 or 32, not 48"),
        (["--kv-group-size", "64"], "--kv-group-size needs --kv-bits"),
        (["--kv-bits", "8", "--policy", "key_norm"], "--kv-bits 8: kv_bits does not go with the policy KeyNorm"),
    ],
)
def test_bits_that_do_not_work_are_refused_with_what_does(capsys, tmp_path, door, argv, words):
    more = ["--prompt-cache-file", str(tmp_path / "a.safetensors")] if door is cache_prompt else []
    assert words in refused(capsys, "--prompt", "x", *more, *argv, door=door)


@pytest.mark.parametrize("flag", ["--max-kv-size", "--quantized-kv-start"])
def test_cache_prompt_refuses_what_generate_refuses(capsys, flag, tmp_path):
    argv = ["--prompt", "x", "--prompt-cache-file", str(tmp_path / "a.safetensors"), flag, "0"]
    assert f"{flag} does not work here: " in refused(capsys, *argv, door=cache_prompt)


@pytest.mark.parametrize("door", [generate, cache_prompt])
def test_help_names_the_real_default_model_and_remarks_what_is_refused(capsys, door):
    code, out, _ = run(door.main, capsys, "--help")
    text = " ".join(out.split())
    default = importlib.import_module("mlx_lm.generate").DEFAULT_MODEL
    assert code == 0 and DEFAULT_MODEL in text.replace(" ", "") and default not in text
    described = text.partition("options:")[2]
    for flag in ("--quantized-kv-start QUANTIZED_KV_START", "--max-kv-size MAX_KV_SIZE"):
        assert described.partition(flag)[2].startswith(" Refused here: ")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", ""], "--model needs a name"),
        (["--model", " "], "--model needs a name"),
        (["--model", __file__], "a model is a folder, this is a file"),
        (["--model", "."], "the folder has no config.json"),
        (["--model", "a/b/c"], "--model a/b/c: not a local folder"),
        (["--model", "x" * 5000], "not a local folder"),
        (["--model", "\udc80"], "not a local folder"),
        (["--adapter-path", ""], "--adapter-path needs a name"),
        (["--adapter-path", "no/such"], "--adapter-path no/such: no such folder"),
        (["--adapter-path", "."], "--adapter-path .: the folder has no adapter_config.json"),
        (["--kv-budget", "9" * 400 + "GB"], "--kv-budget"),
        (["--kv-budget", "inf"], "--kv-budget"),
        (["--prompt-cache-file", ""], "--prompt-cache-file needs a name"),
        (["--prompt-cache-file", "x", "--system-prompt", "y"], "--system-prompt does not go with --prompt-cache-file"),
        (["--prefill", "exact", "--prefill-step-size", "1"], "--prefill exact needs a --prefill-step-size of 2"),
    ],
)
def test_names_that_cannot_be_are_one_line(capsys, argv, words):
    assert words in refused(capsys, *argv)


@pytest.mark.parametrize("config", ["{bad", "[]", "{}", '{"model_type": "nope"}', '{"model_type": "llama"}'])
def test_a_damaged_model_folder_is_one_line(capsys, tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    assert "cannot be loaded" in refused(capsys, "--model", str(tmp_path))


def test_sampling_and_settings_refuse_the_same_values_in_python():
    for name, value in (("temp", math.nan), ("top_k", 1.5), ("seed", -1), ("min_p", "x"), ("top_p", True)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            Sampling(**{name: value})
    for name in ("max_tokens", "prefill_step_size"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            Settings(**{name: 0})
    assert Sampling(temp=0, top_p=0, seed=None) and Settings(max_tokens=-1)


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_the_least_temperature_and_top_p_still_draw_the_likeliest_token(dtype):
    mx.random.seed(1)
    logits = 3 * mx.random.normal((1, 2048))
    logprobs = (logits - mx.logsumexp(logits, keepdims=True)).astype(dtype)
    best = mx.argmax(logprobs).item()
    for least in ({"temp": RANGES["temp"].low}, {"temp": 1.0, "top_p": RANGES["top_p"].low}):
        sampler = make_sampler(**least)
        assert [sampler(logprobs).item() for _ in range(8)] == [best] * 8
