"""Several ranks that ``mlx.launch`` starts are one command: its tokens, its budget, its printout and its errors."""

import json
import pickle
import socket
import sys
from types import SimpleNamespace

import launching
import mlx.core as mx
import pytest
import tiny
from commands import document
from commands import run as run_alone
from mlx_lm.models import qwen2

from zm_mlx import generate, launched
from zm_mlx.budget import Budget, Request
from zm_mlx.calibration.finding import BESIDE
from zm_mlx.calibration.fingerprint import lineage
from zm_mlx.calibration.table import Table
from zm_mlx.errors import UserError
from zm_mlx.host import agreeing, part, ranks
from zm_mlx.host.heads import Sharing
from zm_mlx.host.part import Part
from zm_mlx.policies import Policy
from zm_mlx.policies.pyramidkv import PyramidKV
from zm_mlx.serving.job import Job, Prompt
from zm_mlx.serving.orders import Orders
from zm_mlx.state.layout import LayerShape

WORDS = "a boat on the water, and the people in it; " * 24
HEADS = ((1.5, 0.5), (0.7, 1.3))  # shares of two layers with two KV heads


@pytest.fixture
def prompt(tmp_path):
    (tmp_path / "prompt.txt").write_text(WORDS)
    return ("--prompt-file", str(tmp_path / "prompt.txt"), "--max-tokens", "16", "--prefill-step-size", "128")


@pytest.fixture
def llama(tmp_path):
    """A llama with a table beside it."""
    model = tiny.model(vocab=2048)
    name = launching.saved(model, tmp_path / "llama")
    table = Table(lineage(model), "llama", {}, ((0.1, HEADS), (0.5, HEADS)))
    table.write(tmp_path / "llama" / BESIDE)
    return name


@pytest.fixture
def deep(tmp_path):
    """A qwen2 of three layers, whose split in two is uneven."""
    mx.random.seed(0)
    args = qwen2.ModelArgs("qwen2", 64, 3, 128, 4, 1e-5, 2048, 2, tie_word_embeddings=False)
    return launching.saved(qwen2.Model(args), tmp_path / "qwen2")


def test_split_heads_give_the_tokens_of_one_process_with_the_table_of_the_whole_model(tmp_path, capsys, llama, prompt):
    asked = ("--model", llama, *prompt, "--kv-budget", "64", "--json")
    code, alone, _ = run_alone(generate.main, capsys, *asked)
    out, err = launching.run(tmp_path, "-m", "zm_mlx.generate", *asked)
    assert code == 0 and "exited" not in err
    assert out.count('"generation_tokens": 16') == out.count("Budget: 2 ranks, ") == 1
    one, two = document(alone), document(out)
    assert two["text"] == one["text"]
    assert one["budget"]["rows"][0][0] > 64 > one["budget"]["rows"][0][1]
    assert two["budget"]["rows"] == [layer[:1] for layer in one["budget"]["rows"]]
    assert sum(two["budget"]["bytes_on_ranks"]) == one["budget"]["bytes"] == one["kv_bytes"]
    assert two["kv_bytes"] == two["budget"]["bytes_on_ranks"][0]
    assert two["full_kv_bytes"] == one["full_kv_bytes"] / 2


def test_split_layers_give_the_tokens_of_one_process_in_what_the_poorest_machine_has(tmp_path, capsys, deep, prompt):
    asked = ("--model", deep, *prompt, "--json")
    trouble = (launching.TROUBLED, "poor", "1", "zm_mlx.generate")
    out, err = launching.run(tmp_path, *trouble, *asked, "--pipeline", "--force")
    assert "exited" not in err
    two = document(out)
    (rows,) = {n for layer in two["budget"]["rows"] for n in layer}
    assert "memory" in two["budget"]["reason"] and two["budget"]["reason"].endswith("rank 1")
    assert 2 * two["budget"]["bytes_on_ranks"][1] == two["budget"]["bytes_on_ranks"][0]
    mode = ("--prefill", two["prefill"]["mode"])
    _, alone, _ = run_alone(generate.main, capsys, *asked, "--kv-budget", str(rows), *mode)
    assert two["text"] == document(alone)["text"]
    assert document(alone)["kv_bytes"] == sum(two["budget"]["bytes_on_ranks"])


def test_where_one_machine_has_too_little_memory_all_ranks_refuse_with_one_line(tmp_path, llama, prompt):
    trouble = (launching.TROUBLED, "poor", "1", "zm_mlx.generate")
    out, err = launching.run(tmp_path, *trouble, "--model", llama, *prompt, "--kv-budget", "1024")
    lines = [line for line in err.splitlines() if line.startswith("zm_mlx")]
    assert len(lines) == 1 and "0.000 GB are free here" in lines[0]
    assert not out
    assert err.count("exited with code") == 2 and "exited with code 0" not in err


@pytest.mark.parametrize("when", [pytest.param("killed-in-prefill", marks=pytest.mark.exhaustive), "killed-in-decode"])
def test_a_rank_that_dies_ends_the_others_with_an_error(tmp_path, when, llama, prompt):
    out, err = launching.run(tmp_path, launching.TROUBLED, when, "1", "zm_mlx.generate", "--model", llama, *prompt)
    assert "zm_mlx.generate: rank 0: error: " in err
    assert "Generation:" not in out
    assert "Node with rank 0 exited with code" in err


def test_a_command_for_one_process_says_so_once(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(launched, "_leave", codes.append)
    monkeypatch.setattr(ranks, "wait_for_all", lambda: None)
    for rank in (0, 1):
        made = object.__new__(launched._Rank)
        made.name, made.rank, made._errors = "zm_mlx.chat", rank, sys.stderr
        made.run(lambda: pytest.fail("it ran"), several=False)
    assert codes == [2, 2]
    assert capsys.readouterr().err.count("zm_mlx.chat: error: this command runs in one process") == 1


def test_an_error_of_all_ranks_is_known_again_in_what_is_made_of_it():
    inner = ValueError("no")
    inner._zm_agreed = True
    try:
        try:
            raise inner
        except ValueError as error:
            raise UserError("--kv-budget: no") from error
    except UserError as error:
        assert ranks.agreed_error(error)
    assert not ranks.agreed_error(UserError("no"))


@pytest.mark.parametrize("first, heads, rows", [(0, (2, 2), [(57, 56), (55, 54)]), (1, (2,), [(55, 54)])])
def test_a_part_has_its_own_layers_and_heads_of_a_layout(first, heads, rows):
    whole = [Policy().layout(layer, 4) for layer in ((59, 58, 57, 56), (53, 52, 55, 54))]
    assert [layout.rows for layout in Part(1, 2, "name", (), first, heads).of(whole)] == rows


def test_heads_that_ranks_cannot_share_are_refused_with_what_works(monkeypatch):
    shape = LayerShape(6, 16, 16, 4)
    monkeypatch.setattr(ranks, "count", lambda: 4)
    for here in (LayerShape(1, 24, 24, 4), LayerShape(2, 12, 12, 4)):  # 6 x 16 numbers, read as other heads
        with pytest.raises(ValueError, match="cut through"):
            part._require_heads([shape], [here])
    for layers, more in ((None, ""), (lambda group: None, " or --pipeline, which splits layers")):
        model = SimpleNamespace(model=SimpleNamespace(**({"pipeline": layers} if layers else {})))
        words = part._remedy(model, "--model x", "heads", [shape], ValueError("cut through"))
        assert words == f"--model x: its 6 KV heads cannot be shared evenly by 4 ranks: mlx.launch -n 2 or 3 or 6{more}"


def test_a_layer_whose_heads_are_not_split_stays_whole_on_each_rank():
    whole = [Policy().layout(64, 1)]
    assert Part(1, 2, "name", (), 0, (1,)).of(whole) == tuple(whole)


def test_bytes_are_those_of_each_rank_also_where_its_layers_get_the_most_rows():
    policy, shape, budget = PyramidKV(), LayerShape(2, 16, 16, 4), 200_000
    first = Part(0, 2, "name", (shape,) * 6, 0, (2,) * 3)
    asked = Budget.parse(f"{budget}B")
    whole, _ = agreeing.shared(first, asked, [shape] * 3, policy, Request(), lambda uniform: Sharing(uniform, ""))
    layouts = first.of(whole.layouts)
    assert layouts[0].rows > whole.layouts[-1].rows
    assert 0.8 * budget < sum(layout.nbytes(shape) for layout in layouts) <= budget


def test_orders_reach_other_ranks_without_what_only_rank_0_has():
    context = SimpleNamespace(_should_stop=True, lock=lambda: None)  # which cannot be sent
    prompt = Prompt("key", [1, 2, 3], {2: "prompt"}, context, lambda: None, True, False)
    orders = Orders(gone=[4], jobs=[Job(None, {"max_tokens": 3}, prompt=prompt)])
    heard = Orders.heard(pickle.loads(pickle.dumps(orders.told())), lambda prompt, args: (prompt.key, args))
    (job,) = heard.jobs
    assert heard.gone == [4] and not heard.stop
    assert (job.prompt.tokens, job.prompt.marks, job.prompt.user_turn) == ([1, 2, 3], {2: "prompt"}, True)
    assert job.prompt.stop == ("key", {"max_tokens": 3}) and not job.abandoned
    assert Orders().told() is None and Orders.heard(None, None) == Orders()


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--pipeline",), "--pipeline splits a model's layers among the processes of mlx.launch, and there is one"),
        (("--prompt-cache-file", "x"), "--prompt-cache-file does not go with mlx.launch"),
        (("--adapter-path", "x"), "--adapter-path does not go with mlx.launch"),
        (("--prompt-lookup",), "--prompt-lookup does not go with mlx.launch"),
        (("--prompt-file", "-"), "standard input does not go with mlx.launch"),
    ],
)
def test_what_does_not_go_with_several_ranks_is_refused_by_name(monkeypatch, flags, words):
    monkeypatch.setattr(ranks, "count", lambda: 1 if "and there is one" in words else 2)
    with pytest.raises(UserError, match=words):
        generate._asked(list(flags))


def test_connections_to_machines_that_are_gone_fail_in_time():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        assert not one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        launched._notice_lost_machines()
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert {one.getsockopt(socket.IPPROTO_TCP, option) for option in launched.KEEP_ALIVE} >= {10, 5, 4}
        one.sendall(b"still open")


def test_an_exchange_of_one_rank_is_its_own_word():
    assert ranks.together(lambda: {"rows": 3}) == [{"rows": 3}]
    assert ranks.agreed(lambda: json.dumps) is json.dumps
