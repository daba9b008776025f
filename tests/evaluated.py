"""What the tests of the evaluation share: a tiny random model that reads text, places in texts, records by hand."""

from functools import cache

import tiny
from mlx_lm.utils import load_tokenizer

from zm_mlx.engine import Engine
from zm_mlx.evaluation.records import Point, Record
from zm_mlx.evaluation.subject import Subject
from zm_mlx.evaluation.task import ROOM, Item
from zm_mlx.flags import DEFAULT_MODEL

PROSE = "\n\n".join(
    f"Paragraph {i} tells of the {['river', 'forest', 'harbour', 'valley'][i % 4]} and its people.\n"
    f"They came in the year {1000 + 7 * i} with {i % 9 + 2} ships, and many of them stayed."
    for i in range(400)
)


@cache
def subject() -> Subject:
    """A random model with the small model's tokenizer."""
    tokenizer = load_tokenizer(DEFAULT_MODEL)
    return Subject(Engine(tiny.model(vocab=2048, head_dim=32), tokenizer, "tiny"))


def item(seed: int = 0, length: int = 600, name: str = "prose 0", code: bool = False, part: int = 0) -> Item:
    """A place in ``PROSE``; other seeds begin elsewhere."""
    tokens = subject().encode(PROSE[2000 * seed : 2000 * seed + 8 * (length + ROOM)])[: length + ROOM]
    return Item(name, "digest", seed, length, lambda: list(tokens), code, part)


POINT = Point("recall", 1, "model", "1.0", "prose 0", "digest", 0, 0, 2048, "zeromerge", "Policy()", 0.1)


def record(values: dict[str, float], **changed) -> Record:
    """A record of ``POINT``, with other fields where they are given."""
    return Record(Point(**{**POINT.__dict__, **changed}), values, 1.0)
