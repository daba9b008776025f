"""Measure the small model on documents that training never saw (PyTorch, full cache).

    python scripts/eval_small_model.py --corpus /tmp/corpus --model zm_mlx/small_model

Recall: 8 facts of 5 digits with unseen names, exact match of greedy decoding, per distance and
averaged over all templates; one prefill serves the 8 questions of a document. Loss: nats a token on
the same last 128 tokens of held-out text, with more and more of the text before them.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_model_data import BOS, TEMPLATES, Documents, read_corpus
from tokenizers import Tokenizer
from train_small_model import Llama, Shape

DISTANCES = (256, 1024, 2048, 3500)
CONTEXTS = (128, 256, 512, 1024, 2048, 4095)
LAST = 128


def load_model(folder: Path) -> Llama:
    """The exported model in float32."""
    config = json.loads((folder / "config.json").read_text())
    model = Llama(Shape(**{k: v for k, v in config.items() if k in Shape.__dataclass_fields__}))
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({k.removeprefix("model."): v.float() for k, v in weights.items()})
    return model.eval()


@torch.no_grad()
def recall(model: Llama, documents: Documents, rng: np.random.Generator, distance: int, template: int) -> np.ndarray:
    """Whether each of 8 questions is answered exactly, by greedy decoding."""
    tokens, queries = documents.examination(rng, distance, template)
    _, cache = model(torch.tensor([tokens]))
    longest = max(len(q.tokens) + len(q.answer) for q in queries)
    rows = torch.zeros(len(queries), longest, dtype=torch.long)
    for i, q in enumerate(queries):
        rows[i, : len(q.tokens) + len(q.answer)] = torch.tensor(q.tokens + q.answer)
    hidden, _ = model(rows, cache)
    guess = model.logits(hidden).argmax(-1)
    # Greedy decoding equals the answer exactly if each of its tokens is the best one after those before it.
    return np.array(
        [
            guess[i, len(q.tokens) - 1 : len(q.tokens) + len(q.answer) - 1].tolist() == q.answer
            for i, q in enumerate(queries)
        ]
    )


@torch.no_grad()
def loss_by_context(model: Llama, documents: Documents, rng: np.random.Generator, count: int) -> dict[int, float]:
    long = [f for f in documents.files if len(f) >= max(CONTEXTS)]
    losses: dict[int, list[float]] = {c: [] for c in CONTEXTS}
    for _ in range(count):
        file = long[int(rng.integers(len(long)))]
        end = int(rng.integers(max(CONTEXTS), len(file) + 1))
        for context in CONTEXTS:
            tokens = torch.tensor([[BOS, *file[end - context : end].tolist()]])
            hidden, _ = model(tokens[:, :-1])
            logits = model.logits(hidden[:, -LAST:])[0]
            losses[context].append(F.cross_entropy(logits, tokens[0, -LAST:]).item())
    return {c: float(np.mean(x)) for c, x in losses.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=2, help="Documents for each template and distance")
    parser.add_argument("--texts", type=int, default=40, help="Held-out texts for the loss")
    parser.add_argument("--templates", type=int, default=len(TEMPLATES), help="The first so many templates")
    parser.add_argument("--distances", type=int, nargs="+", default=DISTANCES)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(args.model)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    documents = Documents(tokenizer, read_corpus(args.corpus), evaluation=True)
    result: dict[str, dict[str, float]] = {"recall": {}, "loss": {}}
    for distance in args.distances:
        hits = []
        for template in range(args.templates):
            rng = np.random.default_rng((args.seed, distance, template))
            hits.append([recall(model, documents, rng, distance, template).mean() for _ in range(args.documents)])
        by_template = np.mean(hits, axis=1)
        n = 8 * np.size(hits)
        error = math.sqrt(max(by_template.mean() * (1 - by_template.mean()), 1e-9) / n)
        result["recall"][str(distance)] = round(float(by_template.mean()), 4)
        worst = int(by_template.argmin())
        print(
            f"distance {distance}: recall {by_template.mean():.3f} ± {error:.3f} ({n} questions; "
            f"{TEMPLATES[0][0]!r} {by_template[0]:.3f}; worst {TEMPLATES[worst][0]!r} {by_template[worst]:.3f})",
            flush=True,
        )
    if args.texts:
        losses = loss_by_context(model, documents, np.random.default_rng(args.seed), args.texts)
        for context, loss in losses.items():
            result["loss"][str(context)] = round(loss, 4)
            print(f"context {context}: loss {loss:.3f}, perplexity {math.exp(loss):.2f}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
