"""How much faster text comes where it quotes its prompt: decoding with prompt lookup beside decoding without.

    python scripts/speed_lookup.py [--model NAME] [--kv-budget ROWS] [--document FILE] [--tokens N] [--draft K ...]

The prompt is a document and then its beginning again, with which the model goes on. It is read once; each way of
decoding gets a copy of the caches, and they take turns. Printed for each number of tokens that are proposed at a
time: the share of tokens that were proposed, calls of the model per token, and the median time without a draft
divided by that with it. Only ratios within one run compare; the tokens are compared as well.
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step

from zm_mlx import PromptLookup, make_prompt_cache, rollback
from zm_mlx.flags import DEFAULT_MODEL
from zm_mlx.host.speculating import fill, speculative_generate_step
from zm_mlx.loading import Source, load_model, load_vocabulary, widen
from zm_mlx.report import first_difference

HANDBOOK = Path(DEFAULT_MODEL) / "handbook.txt"


def prompt_of(tokenizer: Any, file: Path, length: int, again: int) -> list[int]:
    """The document's first ``length`` tokens, and the first ``again`` of them once more."""
    document = tokenizer.encode(file.read_text(), add_special_tokens=False)[:length]
    return document + tokenizer.encode("\n\n", add_special_tokens=False) + document[:again]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--kv-budget", type=int, default=2048, help="rows per head")
    parser.add_argument("--document", type=Path, default=HANDBOOK)
    parser.add_argument("--length", type=int, default=1500, help="tokens of the document")
    parser.add_argument("--again", type=int, default=40, help="tokens of its beginning that are quoted already")
    parser.add_argument("--tokens", type=int, default=200, help="to generate")
    parser.add_argument("--draft", type=int, nargs="+", default=[3, 8, 16], help="tokens proposed at a time")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    source = Source(args.model)
    tokenizer, model = load_vocabulary(source).tokenizer, load_model(source)
    widen(model)
    prompt = mx.array(prompt_of(tokenizer, args.document, args.length, args.again))
    caches = make_prompt_cache(model, args.kv_budget, prefill="streaming")
    fill([(model, caches)], prompt[:-1], 2048)
    numbers: Any = prompt.tolist()

    def plain(caches: list[Any]) -> list[tuple[int, bool]]:
        steps = generate_step(prompt[-1:], model, max_tokens=args.tokens, prompt_cache=caches)
        return [(int(token), False) for token, _ in steps]

    def lookup(k: int) -> Callable[[list[Any]], list[tuple[int, bool]]]:
        def run(caches: list[Any]) -> list[tuple[int, bool]]:
            draft = PromptLookup(numbers[:-1])
            with rollback(caches, k):
                steps = speculative_generate_step(
                    prompt[-1:], model, draft, max_tokens=args.tokens, num_draft_tokens=k, prompt_cache=caches
                )
                return [(int(token), drafted) for token, _, drafted in steps]

        return run

    ways = {0: plain, **{k: lookup(k) for k in args.draft}}
    seconds: dict[int, list[float]] = {k: [] for k in ways}
    found: dict[int, list[tuple[int, bool]]] = {}
    for _ in range(args.repeats):
        for k, way in ways.items():
            own = copy.deepcopy(caches)
            begin = time.perf_counter()
            found[k] = way(own)
            seconds[k].append(time.perf_counter() - begin)
    without = [token for token, _ in found[0]]
    print(f"{args.model}: {prompt.size} prompt tokens, {args.kv_budget} rows per head, {args.tokens} tokens generated")
    print(f"{'proposed':>9}{'accepted':>10}{'calls per token':>17}{'times as fast':>15}  tokens")
    for k in args.draft:
        accepted = sum(drafted for _, drafted in found[k]) / args.tokens
        ratio = median(seconds[0]) / median(seconds[k])
        at = first_difference(without, [token for token, _ in found[k]])
        same = "the same" if at is None else f"differ from {at + 1} on"
        print(f"{k:>9}{accepted:>10.2f}{1 - accepted:>17.2f}{ratio:>15.2f}  {same}")
    print(f"the text: {tokenizer.decode(without)[:200]!r}")


if __name__ == "__main__":
    main()
