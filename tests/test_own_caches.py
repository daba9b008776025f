"""A model whose object was told to make our caches: all of mlx-lm takes them, and its own are still known."""

import threading

import pytest
import tiny
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

import zm_mlx
from zm_mlx.errors import UnsupportedModelError
from zm_mlx.host.own_caches import own_caches


def kinds(caches):
    return [type(c) for c in caches]


@pytest.mark.parametrize("planned", [True, False])
def test_a_model_that_makes_our_caches_makes_them_without_end(planned):
    model = tiny.model()
    plan = zm_mlx.plan_cache(model, 24)
    model.make_cache = lambda: plan.caches(model) if planned else zm_mlx.make_prompt_cache(model, 24)
    made = make_prompt_cache(model)
    assert kinds(made) == [zm_mlx.ZeroMergeCache] * len(model.layers)
    assert kinds(zm_mlx.make_prompt_cache(model, 40)) == kinds(made)
    assert kinds(own_caches(model)) == [KVCache] * len(model.layers)


def test_caches_that_somebody_else_gave_a_model_are_its_own():
    model = tiny.model()
    model.make_cache = lambda: [KVCache(), RotatingKVCache(8)]
    assert kinds(own_caches(model)) == [KVCache, RotatingKVCache]
    assert kinds(zm_mlx.make_prompt_cache(model, 24)) == [zm_mlx.ZeroMergeCache, RotatingKVCache]


def test_a_class_that_makes_our_caches_is_refused_and_not_asked_without_end():
    class Ours(type(tiny.model())):
        def make_cache(self):
            return zm_mlx.make_prompt_cache(self, 24)

    model = tiny.model()
    model.__class__ = Ours
    with pytest.raises(UnsupportedModelError, match="give make_cache to the model, not to its class"):
        make_prompt_cache(model)
    assert kinds(own_caches(tiny.model())) == [KVCache] * 2  # nothing is left over


def test_caches_that_are_planned_in_one_thread_run_in_another():
    model = tiny.model()
    plan = zm_mlx.plan_cache(model, 24)
    model.make_cache = lambda: plan.caches(model)
    heard = []

    def run():
        heard.append(model(tiny.prompt(60), cache=make_prompt_cache(model)).sum().item())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert heard
