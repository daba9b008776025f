"""Which table is used: the model's own, found wherever its folder lies; another model's or a damaged one never."""

import json
import shutil
import warnings
from dataclasses import replace

import commands
import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
from commands import document
from mlx.utils import tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

import zm_mlx
from zm_mlx import cache_prompt, doctor, generate
from zm_mlx.calibration import finding
from zm_mlx.calibration.finding import Search
from zm_mlx.calibration.fingerprint import fingerprint, lineage
from zm_mlx.calibration.table import Table, TableError
from zm_mlx.flags import DEFAULT_MODEL
from zm_mlx.policies import BY_NAME, PyramidKV

SHARES = ((0.5, 1.5), (0.25, 1.75))
SMALL_SHARES = ((0.5, 1.5), (0.25, 1.75), (1.0, 0.5), (0.5, 2.0))
LONG = {"prompt_length": 4000}


@pytest.fixture
def model():
    return tiny.model()


@pytest.fixture
def table(model):
    return of(model)


@pytest.fixture(autouse=True)
def places(tables, tmp_path, monkeypatch):
    """The user's and the package's folder, both empty."""
    monkeypatch.setattr(finding, "SHIPPED", tmp_path / "shipped")
    for folder in (tables, finding.SHIPPED):
        folder.mkdir(exist_ok=True)
    yield {"user": tables, "package": finding.SHIPPED}
    for file in tables.iterdir():
        file.unlink()


def of(model, name="tiny", shares=SHARES):
    return Table(lineage(model), name, {"tokens": 64, "texts": 2, "importance": "made up"}, ((0.1, shares),))


def rows(plan):
    return [a.rows for a in plan.layouts]


def plan(model, budget=400, **more):
    return zm_mlx.plan_cache(model, budget, **{**LONG, **more})


# ---- fingerprints


def test_a_fingerprint_is_of_the_weights_and_not_of_their_folder_or_width(model, tmp_path):
    other = tmp_path / "elsewhere" / "model"
    shutil.copytree(DEFAULT_MODEL, other)
    assert fingerprint(load_model(other)[0]) == fingerprint(load_model(finding.Path(DEFAULT_MODEL))[0])
    narrow = tiny.model(dtype=mx.bfloat16)
    wide = tiny.model()
    wide.update(tree_map(lambda x: x.astype(mx.float32), narrow.parameters()))
    assert fingerprint(wide) == fingerprint(narrow) != fingerprint(model)


def test_fingerprints_tell_trainings_and_shapes_apart(model):
    assert fingerprint(model) == fingerprint(tiny.model())
    others = [tiny.model(1), tiny.model(layers=3), tiny.model(kv_heads=4)]
    last = tiny.model()
    last.model.layers[-1].mlp.down_proj.weight = last.model.layers[-1].mlp.down_proj.weight * 1.01
    assert len({fingerprint(m) for m in (model, *others, last)}) == 5


def trained(seed=0, **more):
    """A model whose norms tell it apart, as training does."""
    made = tiny.model(seed, **more)
    mx.random.seed(seed)
    for layer in made.model.layers:
        layer.input_layernorm.weight = mx.random.uniform(0.5, 2, (64,))
    return made


@pytest.mark.parametrize("change", ["quantised", "half", "adapter"])
def test_a_table_is_for_all_quantisations_widths_and_adapters_of_a_training(change):
    model, other = trained(), trained()
    if change == "quantised":
        nn.quantize(other, group_size=32, bits=4)
    elif change == "half":
        other.set_dtype(mx.bfloat16)
    else:
        linear_to_lora_layers(other, 2, {"rank": 2, "scale": 1.0, "dropout": 0.0})
    assert fingerprint(other) != fingerprint(model)
    assert lineage(other) == lineage(model)
    assert rows(plan(other, head_rows=of(model))) == rows(plan(model, head_rows=of(model))) != [(400, 400)] * 2


def test_other_trainings_and_untrained_models_have_another_lineage():
    last = trained()
    last.model.norm.weight = last.model.norm.weight * 1.01
    made = [trained(), trained(1), trained(layers=3), last, tiny.model(), tiny.model(1)]
    assert len({lineage(m) for m in made}) == 6


# ---- finding


@pytest.mark.parametrize("place", ["user", "package"])
def test_a_models_table_is_used_by_itself(model, table, places, place):
    table.write(places[place] / f"{table.model}.json")
    found = plan(model)
    assert rows(found) == [a.rows for a in table.layouts(plan(model, head_rows=None).layouts, found.shapes, 4000)]
    assert rows(found) != [(400, 400)] * 2 and "table of tiny" in found.heads_reason
    caches = zm_mlx.make_prompt_cache(model, 400, **LONG)
    assert [c.layout for c in caches] == list(found.layouts)


def test_a_table_beside_the_model_comes_first_then_the_users_then_the_packages(model, places, tmp_path):
    of(model, "shipped").write(places["package"] / f"{lineage(model)}.json")
    assert "table of shipped" in plan(model).heads_reason
    of(model, "users").write(places["user"] / f"{lineage(model)}.json")
    assert "table of users" in plan(model).heads_reason
    of(model, "beside").write(tmp_path / finding.BESIDE)
    assert "table of beside" in plan(model, head_rows=Search(tmp_path)).heads_reason
    assert "table of users" in plan(model).heads_reason


def test_without_a_table_heads_are_uniform_and_the_remedy_is_named(model):
    assert rows(plan(model)) == [(400, 400)] * 2
    assert plan(model).heads_reason == (
        "uniform rows per head: no table for this model, python -m zm_mlx.calibrate makes one"
    )


def test_none_is_uniform_though_there_is_a_table(model, table, places):
    table.write(places["user"] / f"{table.model}.json")
    assert rows(plan(model, head_rows=None)) == rows(plan(model, head_rows="none")) == [(400, 400)] * 2


@pytest.mark.parametrize("budget", ["auto", 1.0, 4100])
def test_a_request_that_fits_is_not_compressed_because_of_a_table(model, table, places, budget):
    table.write(places["user"] / f"{table.model}.json")
    found = plan(model, budget, max_tokens=0 if budget == 1.0 else 90)
    assert found.capacity >= 4000 and len(set(sum(rows(found), ()))) == 1
    assert "fit" in found.heads_reason


@pytest.mark.parametrize(
    ("budget", "prompt"), [(0.1, 4000), (400, 4000), (400, None), ("200KB", 4000), ("200KB", None)]
)
def test_bytes_of_the_caches_are_the_budgets_with_a_table_too(model, table, budget, prompt):
    even, found = (plan(model, budget, prompt_length=prompt, head_rows=x) for x in (None, table))
    assert found.nbytes == even.nbytes and rows(found) != rows(even)
    if budget == "200KB":
        assert found.nbytes <= 200_000
    caches = found.caches(model)
    tiny.feed(model, caches, tiny.prompt(40))
    assert sum(c.nbytes for c in caches) >= found.nbytes  # an exact prompt is held whole until its end


def test_a_policy_that_shares_rows_out_itself_keeps_its_own(model, table, places):
    table.write(places["user"] / f"{table.model}.json")
    policy = PyramidKV()
    found = plan(model, policy=policy)
    assert found.layouts == policy.layouts(400, [2, 2]) and "policy" in found.heads_reason
    assert found.layouts != plan(model, policy=policy, head_rows=table).layouts  # unless asked


def test_unequal_heads_are_filled_to_their_own_rows(model, table):
    ask = {"prefill": "streaming", "prompt_length": None, "policy": zm_mlx.Policy()}
    caches = zm_mlx.make_prompt_cache(model, 128, head_rows=table, **ask)
    logits = tiny.feed(model, caches, tiny.prompt(400), 64)
    assert mx.isfinite(logits).all()
    assert sum(c.nbytes for c in caches) == plan(model, 128, **ask).nbytes
    assert len({n for c in caches for n in c.layout.rows}) > 2


# ---- what does not fit


def test_another_models_table_is_refused_where_it_was_asked_for(model, table, tmp_path):
    file = tmp_path / "other.json"
    replace(table, model="0" * 32).write(file)
    for asked in (file, str(file), replace(table, model="0" * 32)):
        for tokens in (4000, 10):  # also where it would not be needed
            with pytest.raises(TableError, match=r"another model \(tiny\); python -m zm_mlx\.calibrate"):
                plan(model, head_rows=asked, prompt_length=tokens)
    assert rows(plan(tiny.model(), head_rows=table)) != [(400, 400)] * 2


@pytest.mark.parametrize("damage", ["other model", "text", "heads"])
def test_a_table_that_does_not_fit_is_passed_over_with_a_warning_that_names_it(model, table, places, damage):
    file = places["user"] / f"{table.model}.json"
    if damage == "text":
        file.write_text(table.text()[:-9])
    elif damage == "heads":
        of(model, shares=((1.0,), (1.0,))).write(file)
    else:
        replace(table, model="0" * 32).write(file)
    with pytest.warns(UserWarning, match=str(file)):
        caches = zm_mlx.make_prompt_cache(model, 400, **LONG)
    assert [c.layout.rows for c in caches] == [(400, 400)] * 2
    of(model, "shipped").write(places["package"] / f"{table.model}.json")
    assert "table of shipped" in plan(model).heads_reason  # the next one is used


def test_a_table_that_fits_warns_of_nothing(model, table, places):
    table.write(places["user"] / f"{table.model}.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zm_mlx.make_prompt_cache(model, 400, **LONG)


@pytest.mark.parametrize("head_rows", ["auto", None, "none"])
def test_a_table_needs_a_budget(model, head_rows):
    with pytest.raises(ValueError, match="kv_budget must be given"):
        zm_mlx.make_prompt_cache(model, None, head_rows=head_rows)


# ---- commands


@pytest.fixture
def folder(tmp_path):
    """The small model elsewhere, with a table beside it."""
    path = tmp_path / "model"
    shutil.copytree(DEFAULT_MODEL, path)
    made = of(load_model(path)[0], "small", SMALL_SHARES)
    made.write(path / finding.BESIDE)
    return path


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("def f(x):\n    return x + 1\n\n" * 20)
    return str(file)


def run(capsys, *argv, door=generate):
    return commands.run(door.main, capsys, *argv)


def test_generate_uses_the_table_beside_the_model_and_says_so(capsys, folder, text):
    ask = ["--model", str(folder), "--prompt-file", text, "--kv-budget", "160", "-m", "3", "--json"]
    code, out, err = run(capsys, *ask)
    told = document(out)["budget"]
    assert code == 0 and "Budget: rows per head by the table of small" in out and str(folder / finding.BESIDE) in out
    heads = [n for layer in told["rows"] for n in layer]
    assert len(set(heads)) > 2 and sum(heads) == 8 * 160
    assert "160 on average" in out and "warning" not in err
    uniform = document(run(capsys, *ask, "--head-rows", "none")[1])["budget"]
    assert uniform["rows"] == [[160, 160]] * 4 and uniform["bytes"] == told["bytes"]


def test_generate_says_that_there_is_no_table(capsys, text):
    code, out, _ = run(capsys, "--prompt-file", text, "--kv-budget", "160", "-m", "1")
    assert code == 0
    assert "uniform rows per head: no table for this model, python -m zm_mlx.calibrate makes one" in out


def test_a_damaged_table_beside_the_model_is_a_warning(capsys, folder, text):
    (folder / finding.BESIDE).write_text("{")
    code, out, err = run(capsys, "--model", str(folder), "--prompt-file", text, "--kv-budget", "160", "-m", "1")
    assert code == 0 and "uniform rows per head" in out
    assert f"warning: {folder / finding.BESIDE}" in err


def test_a_damaged_or_foreign_table_of_a_flag_is_one_line(capsys, folder, text, tmp_path):
    file = tmp_path / "x.json"
    ask = ["--model", str(folder), "--prompt-file", text, "--kv-budget", "160", "-m", "1", "--head-rows"]
    file.write_text("{")
    for problem, words in (
        (str(file), "is no table"),
        (str(tmp_path / "gone"), "cannot be read"),
        ("", "needs a name"),
    ):
        code, out, err = run(capsys, *ask, problem)
        assert (code, out) == (2, "") and err.count("\n") == 1 and "--head-rows" in err and words in err
    replace(Table.read(folder / finding.BESIDE), model="0" * 32).write(file)
    code, _, err = run(capsys, *ask, str(file))
    assert code == 2 and "--head-rows: " in err and "another model" in err and "zm_mlx.calibrate" in err


def test_the_rotating_cache_gets_the_mean_rows(capsys, folder, text):
    ask = ["--model", str(folder), "--prompt-file", text, "--kv-budget", "160", "-m", "1", "--json"]
    code, out, _ = run(capsys, *ask, "--cache", "rotating")
    assert code == 0 and document(out)["kv_bytes"] == 160 * 8 * 2 * 32 * 4


def test_a_saved_prompt_keeps_its_rows_and_the_budget_that_it_was_given(capsys, folder, text, tmp_path):
    file = str(tmp_path / "cache.safetensors")
    ask = ["--model", str(folder), "--prompt-file", text, "--kv-budget", "160", "--prompt-cache-file", file]
    code, out, _ = run(capsys, *ask, door=cache_prompt)
    assert code == 0 and "table of small" in out
    saved = zm_mlx.load_prompt_cache(file, load_model(folder)[0])
    assert len({n for c in saved for n in c.layout.rows}) > 2
    (folder / finding.BESIDE).unlink()
    go_on = ["--prompt-cache-file", file, "-p", "x", "-m", "1"]
    assert run(capsys, *go_on, "--kv-budget", "160")[0] == 0
    code, _, err = run(capsys, *go_on, "--kv-budget", "161")
    assert code == 2 and "160 on average" in err
    code, _, err = run(capsys, *go_on, "--head-rows", "none")
    assert code == 2 and "--head-rows does not go with --prompt-cache-file" in err


def test_doctor_lists_tables_and_names_the_damaged_one(capsys, table, places):
    assert commands.run(doctor.main, capsys)[1].count("No tables of rows per KV head here") == 1
    table.write(places["user"] / "a.json")
    (places["package"] / "b.json").write_text("{")
    code, out, _ = commands.run(doctor.main, capsys)
    assert code == 0 and f"Rows per KV head: {Table.read(places['user'] / 'a.json').words}" in out
    assert f"Rows per KV head, NOT USED: {places['package'] / 'b.json'}" in out
    told = json.loads(commands.run(doctor.main, capsys, "--json")[1])
    assert len(told["tables"]) == 2


@pytest.mark.parametrize("name", ["paper", "h2o", "snapkv", "streaming_llm", "tova", "key_norm"])
def test_published_methods_keep_uniform_rows_though_there_is_a_table(model, table, places, name):
    table.write(places["user"] / f"{table.model}.json")
    policy = BY_NAME[name]()
    found = plan(model, policy=policy)
    assert found.layouts == policy.layouts(400, [2, 2]) and "as the policy shares them out" in found.heads_reason


def test_a_policy_that_cannot_follow_a_table_refuses_it(model, table):
    with pytest.raises(TableError, match="TOVA keeps the same tokens in all heads"):
        plan(model, policy=BY_NAME["tova"](), head_rows=table)
