"""Memory of a long conversation: what the chat holds after 1,000, 10,000 and 50,000 tokens.

    python scripts/chat_memory.py [--model NAME] [--kv-budget ROWS] [--turn TOKENS] [--tokens N ...]

Turns of the handbook's text are answered by the model, as ``python -m zm_mlx.chat`` does it. For each
number of tokens: bytes of the KV cache after an answer, MLX's active memory then, MLX's peak since the line
before, and the largest resident set of the process so far.
"""

import argparse
import itertools
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from zm_mlx.chatting.session import Session
from zm_mlx.engine import Engine, Settings
from zm_mlx.flags import DEFAULT_MODEL
from zm_mlx.host.caches import Wish
from zm_mlx.host.model_caches import zero_merge
from zm_mlx.loading import Source, load_model, load_vocabulary, widen

HANDBOOK = Path(DEFAULT_MODEL) / "handbook.txt"
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of a unit of ru_maxrss


def open_session(name: str, rows: int) -> Session:
    """A new conversation with a model, in float32 where the machine has no GPU."""
    source = Source(name)
    vocabulary = load_vocabulary(source)
    model = load_model(source)
    widen(model)
    return Session(Engine(model, vocabulary.tokenizer, name), source, Wish(str(rows), "streaming"))


def texts(session: Session, tokens: int) -> Iterator[str]:
    """Pieces of the handbook, of so many tokens each, over and over."""
    tokenizer = session.engine.tokenizer
    ids = tokenizer.encode(HANDBOOK.read_text(), add_special_tokens=False)
    for i in itertools.count():
        begin = i * tokens % (len(ids) - tokens)
        yield f"{i}: " + tokenizer.decode(ids[begin : begin + tokens])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--kv-budget", type=int, default=512, help="rows per head")
    parser.add_argument("--turn", type=int, default=400, help="tokens of a user's text")
    parser.add_argument("--answer", type=int, default=20, help="tokens of an answer, at most")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000, 10_000, 50_000])
    args = parser.parse_args()
    session = open_session(args.model, args.kv_budget)
    turns = texts(session, args.turn)
    talk = session.conversation
    settings = Settings(args.answer, 512)
    print(f"{'tokens':>8}{'turns':>7}{'KV bytes':>12}{'budget':>12}{'active MB':>11}{'peak MB':>9}{'resident MB':>13}")
    mx.reset_peak_memory()
    for count in args.tokens:
        while talk.seen < count:
            for _ in talk.answer(talk.encode(next(turns)), settings, lambda: False):
                pass
        held = sum(c.nbytes for c in zero_merge(talk.caches.every))
        mx.clear_cache()
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
        memory = (mx.get_active_memory(), mx.get_peak_memory(), resident)
        active, peak, resident = (f"{x / 1e6:.2f}" for x in memory)
        print(
            f"{talk.seen:>8}{talk.standing.turns:>7}{held:>12}{session.plan.nbytes:>12}"
            f"{active:>11}{peak:>9}{resident:>13}",
            flush=True,
        )
        mx.reset_peak_memory()


if __name__ == "__main__":
    main()
