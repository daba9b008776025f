"""The figure: every cache's line and name, at the budgets measured, and the same file every time."""

import pytest
from evaluated import record
from matplotlib.image import imread

from zm_mlx.errors import UserError
from zm_mlx.evaluation import figure
from zm_mlx.evaluation.summary import Results
from zm_mlx.evaluation.task import Metric
from zm_mlx.policies import BY_NAME

CACHES = [*BY_NAME, "zeromerge-streaming", "rotating", "quantized"]


class Task:
    version = 1

    def __init__(self, name, key):
        self.name, self.metrics = name, (Metric(key, "loss above full (nats a token)"), Metric("other", "not shown"))


TASKS = [Task("continuation", "loss"), Task("recall", "loss")]


def results(caches=CACHES[:3], budgets=(0.05, 0.1, 0.2), lengths=(2048,)):
    """Losses that lie close together, of two documents."""
    found = []
    for task in TASKS:
        for length in lengths:
            common = {"task": task.name, "prompt_tokens": length}
            for d in range(2):
                found.append(record({"loss": 0.0}, **common, document=f"prose {d}", cache="full", budget=1.0))
                for i, cache in enumerate(caches):
                    for b in budgets:
                        values = {"loss": (1 + 0.01 * i + 0.1 * d) * 0.1 / b, "other": 1.0}
                        found.append(record(values, **common, document=f"prose {d}", cache=cache, budget=b))
    return Results(found)


def draw(path, **more):
    assert figure.draw(results(**more), TASKS, "some-model", str(path))
    return path


def test_every_cache_is_named_in_every_panel(tmp_path):
    drawn = draw(tmp_path / "x.svg", caches=CACHES).read_text()
    for name in (*CACHES, "full"):
        assert drawn.count(f">{name}</text>") == len(TASKS), name
    for words in ("some-model", "continuation, 2,048 tokens", "loss above full", ">5 %<", ">10 %<", ">20 %<"):
        assert words in drawn
    assert "not shown" not in drawn


def test_every_cache_looks_otherwise_and_keeps_its_look_in_all_panels():
    looks = [tuple(sorted(figure.style(c, CACHES).items())) for c in CACHES]
    assert len(set(looks)) == len(CACHES)


@pytest.mark.parametrize("budgets", [(0.1,), (0.05, 0.1, 0.2)])
@pytest.mark.parametrize("suffix", figure.SUFFIXES)
def test_any_number_of_budgets_and_any_kind_of_file(tmp_path, budgets, suffix):
    path = draw(tmp_path / f"x{suffix}", budgets=budgets)
    assert path.stat().st_size > 5000
    if suffix == ".png":
        image = imread(path)
        assert image.shape[1] > 1000 and image[..., :3].std() > 0.05


def test_each_length_has_a_panel_of_its_own(tmp_path):
    drawn = draw(tmp_path / "x.svg", lengths=(512, 2048)).read_text()
    assert all(f"{task.name}, {n} tokens" in drawn for task in TASKS for n in ("512", "2,048"))


def test_the_same_results_make_the_same_file(tmp_path):
    assert draw(tmp_path / "a.svg").read_text() == draw(tmp_path / "b.svg").read_text()


def test_without_anything_to_compare_nothing_is_drawn(tmp_path):
    only = Results([record({"loss": 0.0}, task="recall", cache="full", budget=1.0)])
    assert not figure.draw(only, TASKS, "some-model", str(tmp_path / "x.svg"))
    assert not list(tmp_path.iterdir())


def test_another_kind_of_file_is_refused():
    with pytest.raises(UserError, match=r"--figure x.jpg: the name must end in .png, .svg, .pdf"):
        figure.check("x.jpg")
