"""What each Metal kernel moves, counted while its source runs on the CPU.

    python scripts/kernel_report.py            (needs the test extra: it runs the executor of tests/metal_host)
    python scripts/kernel_report.py --json

Device bytes read and written per kernel, the fewest that the operation needs, their ratio, unique
128-byte lines a simdgroup touches between two synchronisations, barriers, and threadgroup memory a
threadgroup. Counts, not times: they are the same on every machine, and Apple hardware has not been
timed. Targets: attend 1.10, also of codes of 8 and 4 bits (the logits of split rows, at most 8 bytes
a row and query head, are shown apart), merge 1.2, compact 1.2 while decoding, score 1.5 of one read
of the keys per tile of 32 queries, attend_chunk one read of the visible rows per tile of 32 queries.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import metal_host

from zm_mlx.ops import check
from zm_mlx.ops.kernels._common import TILE, kernel
from zm_mlx.policies import Policy
from zm_mlx.state.coding import Coding
from zm_mlx.state.layout import Layout
from zm_mlx.state.state import Call

QUERY_TILE = 32
CHUNK = 64  # queries of the prefill kernels; heads are cut to CHUNK_HEADS there, bytes grow with them
CHUNK_HEADS = 2
CODINGS = (Coding(8, 64), Coding(4, 64))


@dataclass(frozen=True)
class Shape:
    name: str
    heads: int
    groups: int
    dim: int
    rows: int

    @property
    def layout(self) -> Layout:
        return Policy().layout(self.rows, self.heads)

    def coded(self, coding: Coding) -> Layout:
        return Policy(kv_bits=coding.bits, kv_group_size=coding.group).layout(self.rows, self.heads)


SHAPES = (
    Shape("LLaMA-2-7B", 32, 1, 128, 512),
    Shape("LLaMA-2-7B", 32, 1, 128, 2048),
    Shape("LLaMA-2-7B", 32, 1, 128, 8192),
    Shape("GQA, G = 4", 8, 4, 128, 2048),
    Shape("GQA, G = 7", 8, 7, 128, 2048),
    Shape("one KV head", 1, 8, 128, 8192),
    Shape("small model", 2, 2, 64, 512),
)


@dataclass
class Line:
    """One operation: sums over its launches."""

    kernel: str
    shape: str
    heads: int
    groups: int
    rows: int
    launches: int
    read: int
    written: int
    scratch: int
    least: int
    ratio: float
    lines: int
    barriers: int
    threadgroup_memory: int


def line(name: str, shape: Shape, launches: list[Any], least: int, scratch: int = 0) -> Line:
    read = sum(x.device_bytes_read for x in launches)
    written = sum(x.device_bytes_written for x in launches)
    return Line(
        name,
        shape.name,
        shape.heads,
        shape.groups,
        shape.rows,
        len(launches),
        read,
        written,
        scratch,
        least,
        (read + written - scratch) / least,
        sum(x.lines for x in launches),
        sum(x.barriers for x in launches),
        max(x.threadgroup_memory for x in launches),
    )


def traced(name: str, shape: Shape, length: int = 1, coding: Coding | None = None) -> list[Any]:
    """The launches of a kernel over full stores, for queries of ``length`` new tokens."""
    case = check.Case(mx.float16, shape.dim, shape.dim, shape.groups, heads=shape.heads, batch=1)
    layout = shape.layout if coding is None else shape.coded(coding)
    state = check.random_state(case, layout, mx.random.key(0))._replace(filled=layout.recent)
    if coding is not None:
        state = check.with_codes(state._replace(since_compaction=layout.staging), layout, coding)
    queries = mx.random.normal((1, shape.heads * shape.groups, length, shape.dim)).astype(mx.float16)
    given = check.Problem(Call(queries, shape.dim**-0.5), state, layout, Policy(), state.scores)
    mx.eval(queries, state)
    with metal_host.options(trace=True), metal_host.record() as launches:
        mx.eval(check.results(name, check.kernel_of(name), given))
    assert all(not x.copied for x in launches), "a launch copies a store"
    return list(launches)


def attend(shape: Shape) -> Line:
    launches = traced("attend", shape)
    rows, tiles = shape.heads * shape.rows, -(-shape.groups // TILE)
    weights = shape.layout.starts[-1] * 4
    own = 2 * 2 * shape.heads * shape.groups * shape.dim  # queries and output
    least = tiles * (rows * 4 * shape.dim + weights) + 8 * rows + own
    split = len(launches) > 1
    return line("attend", shape, launches, least, 8 * shape.groups * rows if split else 0)


def attend_codes(shape: Shape, coding: Coding) -> Line:
    """``attend`` over a store whose rows are codes, but for the residual and the staged ones."""
    launches = traced("attend", shape, coding=coding)
    layout, tiles = shape.coded(coding), -(-shape.groups // TILE)
    rows, numbers = shape.heads * shape.rows, shape.heads * (layout.residual + layout.staging)
    own = 2 * 2 * shape.heads * shape.groups * shape.dim
    stored = (rows - numbers) * 2 * coding.nbytes(shape.dim, 2) + numbers * 4 * shape.dim
    least = tiles * (stored + layout.starts[-1] * 4) + 8 * rows + own
    split = len(launches) > 1
    return line(f"attend {coding.bits}b", shape, launches, least, 8 * shape.groups * rows if split else 0)


def attend_chunk(shape: Shape) -> Line:
    launches = [x for x in traced("attend_chunk", shape, CHUNK) if x.name != "zm_score"]
    tiles = -(-shape.groups * CHUNK // QUERY_TILE)
    own = 2 * shape.heads * shape.groups * CHUNK * shape.dim  # queries
    least = tiles * shape.heads * shape.rows * 4 * shape.dim + 2 * own
    return line("attend_chunk", shape, launches, least)


def score(shape: Shape) -> Line:
    launches = [x for x in traced("score", shape, CHUNK) if x.name == "zm_score"]
    tiles = -(-shape.groups * CHUNK // QUERY_TILE)
    return line("score", shape, launches, tiles * shape.heads * shape.rows * 2 * shape.dim)


def compaction(shape: Shape) -> list[Line]:
    """A compaction while decoding: staging is full, its tokens and the context are the pool."""
    layout, launches = shape.layout, traced("compact", shape)
    row, heads = 4 * shape.dim, shape.heads
    # Of each residual row: float32 sums in and out, the key in, key and value out.
    sums = heads * layout.residual * (16 + 2 + 4) * shape.dim
    victims = heads * layout.staging  # as many leave as arrive
    moved = heads * (layout.context[0] + layout.residual) * (2 * row + 5 * 4)
    scores = 4 * heads * (layout.context[0] + layout.staging)
    merge = [x for x in launches if x.name == "zm_merge"]
    others = [x for x in launches if x.name != "zm_merge"]
    return [
        line("merge", shape, merge, victims * (row + 4) + sums),
        line("compact", shape, others, moved + scores),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="Print one JSON document instead of the table")
    parser.add_argument("--max-rows", type=int, default=8192, help="Leave out shapes with more rows per head")
    args = parser.parse_args()
    head = ("kernel", "shape", "heads", "G", "rows", "launches", "read", "written", "scratch", "least", "ratio")
    found = []
    if not args.json:
        print("{:<13}{:<13}{:>5}{:>3}{:>6}{:>9}{:>13}{:>13}{:>11}{:>13}{:>7}".format(*head), end="")
        print(f"{'lines':>10}{'barriers':>10}{'tg bytes':>10}")
    with metal_host.installed():
        kernel.cache_clear()
        for shape in (s for s in SHAPES if s.rows <= args.max_rows):
            few = Shape(shape.name, min(shape.heads, CHUNK_HEADS), shape.groups, shape.dim, shape.rows)
            lines = [attend(shape), *(attend_codes(shape, x) for x in CODINGS), *compaction(shape)]
            if shape.rows <= 2048:
                lines += [attend_chunk(few), score(few)]
            found += lines
            for x in lines if not args.json else []:
                print(
                    f"{x.kernel:<13}{x.shape:<13}{x.heads:>5}{x.groups:>3}{x.rows:>6}{x.launches:>9}{x.read:>13,}"
                    f"{x.written:>13,}{x.scratch:>11,}{x.least:>13,}{x.ratio:>7.3f}"
                    f"{x.lines:>10,}{x.barriers:>10,}{x.threadgroup_memory:>10,}",
                    flush=True,
                )
    kernel.cache_clear()
    if not args.json:
        print("(mlx's sdpa_vector requests keys and values once a query head: 4 times attend's at G = 4)")
    if args.json:
        print(json.dumps([asdict(x) for x in found]))


if __name__ == "__main__":
    main()
