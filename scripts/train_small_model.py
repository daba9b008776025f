"""Train the small LLaMA that ships with the package (PyTorch, CPU or GPU).

    pip install torch==2.13.0 tokenizers safetensors
    python scripts/train_small_model.py --corpus /tmp/corpus --out /tmp/small --minutes 104
    python scripts/train_small_model.py --corpus /tmp/corpus --out /tmp/small --minutes 104 --resume
    python scripts/eval_small_model.py --corpus /tmp/corpus --model /tmp/small/model --documents 3

Muon for matrices and AdamW for embeddings and norms, a curriculum of lengths 256, 1,024, 2,048,
4,096 by share of the training time, 4,096 to 8,192 tokens a step. A checkpoint is written every
three minutes, on Ctrl-C and when killed; ``--resume`` continues from it.

The model in ``zm_mlx/small_model``: 3.48M parameters, 104 minutes on two shared cores of a server CPU,
21.4M tokens; resumed twice on the way with another ``--minutes`` (112 and 122 at first), so one
uninterrupted run ends a little differently. Measured with the last command above, held-out text and
names, 8 facts of 5 digits, greedy exact match over all 14 templates, 336 questions a distance:

    distance    1,024   2,048   3,500          context      128    256    512  1,024  2,048  4,095
    recall      .988    .997    .967           perplexity  13.51   9.01   7.96  7.45   6.94   6.74
    (± .006, .003, .010; "The code for <name> is <digits>." alone 1.000 at each distance)
"""

import argparse
import json
import math
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from small_model_data import BOS, EOS, Documents, read_corpus, train_tokenizer
from tokenizers import Tokenizer

PHASES = ((0.00, 256), (0.15, 1024), (0.33, 2048), (0.50, 4096))  # (share of time, length)
TOKENS_PER_STEP = {256: 4096, 1024: 8192, 2048: 8192, 4096: 8192}
PEAK_LR, FLOOR, WARM_UP_STEPS = 4e-3, 0.03, 50


@dataclass
class Shape:
    """The shape of the model, named as in its ``config.json``."""

    vocab_size: int = 2048
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 704
    rope_theta: float = 5e5
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096


class Linear(torch.nn.Linear):
    def __init__(self, n: int, m: int):
        super().__init__(n, m, bias=False)


class Attention(torch.nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.shape = s
        self.q_proj = Linear(s.hidden_size, s.num_attention_heads * s.head_dim)
        self.k_proj = Linear(s.hidden_size, s.num_key_value_heads * s.head_dim)
        self.v_proj = Linear(s.hidden_size, s.num_key_value_heads * s.head_dim)
        self.o_proj = Linear(s.num_attention_heads * s.head_dim, s.hidden_size)

    def forward(self, x, cos, sin, cache=None):
        B, L, _ = x.shape
        s = self.shape

        def heads(y):
            return y.view(B, L, -1, s.head_dim).transpose(1, 2)

        def rotate(y):
            a, b = y.chunk(2, -1)
            return y * cos + torch.cat((-b, a), -1) * sin

        q, k, v = rotate(heads(self.q_proj(x))), rotate(heads(self.k_proj(x))), heads(self.v_proj(x))
        new = (k, v)
        if cache is not None:
            k, v = (torch.cat((old.expand(B, -1, -1, -1), y), 2) for old, y in zip(cache, (k, v), strict=True))
        groups = s.num_attention_heads // s.num_key_value_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if cache is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mask = torch.ones(L, k.shape[2], dtype=torch.bool).tril(k.shape[2] - L)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).reshape(B, L, -1)), new


class Block(torch.nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.input_layernorm = torch.nn.RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.post_attention_layernorm = torch.nn.RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.self_attn = Attention(s)
        self.mlp = torch.nn.ModuleDict(
            {
                "gate_proj": Linear(s.hidden_size, s.intermediate_size),
                "up_proj": Linear(s.hidden_size, s.intermediate_size),
                "down_proj": Linear(s.intermediate_size, s.hidden_size),
            }
        )

    def forward(self, x, cos, sin, cache=None):
        attended, new = self.self_attn(self.input_layernorm(x), cos, sin, cache)
        x = x + attended
        h = self.post_attention_layernorm(x)
        x = x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h))
        return x, new


class Llama(torch.nn.Module):
    """LLaMA with tied embeddings; parameter names are Hugging Face's without ``model.``."""

    def __init__(self, s: Shape):
        super().__init__()
        self.shape = s
        self.embed_tokens = torch.nn.Embedding(s.vocab_size, s.hidden_size)
        self.layers = torch.nn.ModuleList(Block(s) for _ in range(s.num_hidden_layers))
        self.norm = torch.nn.RMSNorm(s.hidden_size, s.rms_norm_eps)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 if "embed" in name else p.shape[1] ** -0.5 * (0.3 if last else 0.7)
                torch.nn.init.normal_(p, std=std)

    def forward(self, ids, cache=None):
        """Hidden states [B, L, hidden] after the last norm, and per layer the (K, V) of ``ids``."""
        s = self.shape
        past = cache[0][0].shape[2] if cache else 0
        t = torch.arange(past, past + ids.shape[1], device=ids.device).float()
        angle = torch.outer(t, s.rope_theta ** (-torch.arange(0, s.head_dim, 2, device=ids.device) / s.head_dim))
        cos, sin = (torch.cat((y, y), -1) for y in (angle.cos(), angle.sin()))
        x = self.embed_tokens(ids)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        kept = []
        for i, layer in enumerate(self.layers):
            x, new = layer(x, cos, sin, cache[i] if cache else None)
            kept.append(new)
        return self.norm(x), kept

    def logits(self, hidden):
        return hidden @ self.embed_tokens.weight.T


def loss_of(model, tokens, weights):
    hidden, _ = model(tokens[:, :-1])
    logits = hidden @ model.embed_tokens.weight.T
    each = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (each * weights.flatten()).sum() / weights.sum(), each


def batch(documents, rng, length):
    mix = (0.45, 0.20) if length == 256 else (0.42, 0.04)
    rows = []
    for _ in range(TOKENS_PER_STEP[length] // length):
        r = rng.random()
        kind = documents.retrieval if r < mix[0] else documents.copy if r < sum(mix) else documents.text
        rows.append(kind(rng, length))
    return (torch.from_numpy(np.stack([r[i] for r in rows])) for i in (0, 1))


def other_load(last):
    """CPU seconds that other processes used since ``last`` per second, and the new reading."""
    with open("/proc/stat") as f:
        user, nice, system = (int(v) / 100 for v in f.readline().split()[1:4])
    now = (time.time(), user + nice + system, sum(os.times()[:2]))
    if last is None:
        return 0.0, now
    return ((now[1] - last[1]) - (now[2] - last[2])) / max(1e-3, now[0] - last[0]), now


def export(model, tokenizer, folder: Path) -> None:
    """Write the model as a Hugging Face folder in float16: ``mlx_lm.load(folder)`` loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"model.{k}": v.detach().half().contiguous().cpu() for k, v in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(model.shape),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": model.shape.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")


def prepare(corpus: Path, out: Path):
    """(tokenizer, files); the tokenizer is trained once and kept in ``out``."""
    files = read_corpus(corpus)
    path = out / "tokenizer.json"
    if not path.exists():
        train_tokenizer([t for _, t in files[::3]]).save(str(path))
    return Tokenizer.from_file(str(path)), files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="Folder for the downloaded sources")
    parser.add_argument("--out", type=Path, required=True, help="Folder for checkpoints and the exported model")
    parser.add_argument("--minutes", type=float, default=110, help="Training time over all runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="Continue from the checkpoint in --out")
    parser.add_argument("--max-threads", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    tokenizer, files = prepare(args.corpus, args.out)
    documents = Documents(tokenizer, files)
    print(f"{sum(len(f) for f in documents.files) / 1e6:.1f}M tokens of text", flush=True)

    model = Llama(Shape(vocab_size=tokenizer.get_vocab_size())).to(device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimisers = [
        torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    step, spent, seen = 0, 0.0, 0
    checkpoint = args.out / "checkpoint.pt"
    if args.resume:
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for o, s in zip(optimisers, saved["optimisers"], strict=True):
            o.load_state_dict(s)
        step, spent, seen = saved["step"], saved["spent"], saved["seen"]

    def save():
        state = {"model": model.state_dict(), "optimisers": [o.state_dict() for o in optimisers]}
        torch.save({**state, "step": step, "spent": spent, "seen": seen}, str(checkpoint) + ".part")
        os.replace(str(checkpoint) + ".part", checkpoint)
        export(model, tokenizer, args.out / "model")

    if device == "cpu":
        import torch._inductor.config as inductor

        inductor.cpp.dynamic_threads = True  # threads follow the load of the machine
    compiled = torch.compile(loss_of, dynamic=False)
    last_save = last_look = time.time()
    load, reading = other_load(None)
    means: dict[str, float] = {}
    threads = args.max_threads
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill saves too, as Ctrl-C does
    try:
        while spent < args.minutes * 60:
            begun = time.time()
            if device == "cpu" and begun - last_look > 4:
                load, reading = other_load(reading)
                last_look = begun
                threads = 1 if load > 0.25 else args.max_threads
                torch.set_num_threads(threads)
            progress = spent / (args.minutes * 60)
            length = [n for share, n in PHASES if progress >= share][-1]
            lr = PEAK_LR * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))
            lr *= min(1.0, (step + 1) / WARM_UP_STEPS)
            rng = np.random.default_rng((args.seed, step))
            tokens, weights = (x.to(device) for x in batch(documents, rng, length))
            with torch.autocast(device, torch.bfloat16):
                loss, each = compiled(model, tokens, weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for o in optimisers:
                for group in o.param_groups:
                    group["lr"] = lr
                o.step()
                o.zero_grad(set_to_none=True)
            with torch.no_grad():
                w = weights.flatten()
                for name, chosen in (("answers", w == 2), ("text", (w == 1) | (w == 0.7))):
                    if chosen.any():
                        now = each[chosen].mean().item()
                        means[name] = 0.95 * means.get(name, now) + 0.05 * now
            step, seen = step + 1, seen + tokens[:, 1:].numel()
            took = time.time() - begun
            spent += min(took, 20.0)  # a compilation is not training
            if step % 20 == 0 or took > 20:
                rate = tokens[:, 1:].numel() / took
                losses = " ".join(f"{k} {v:.3f}" for k, v in means.items())
                where = f"step {step} {spent / 60:.1f} min {seen / 1e6:.2f}M length {length} lr {lr:.1e}"
                print(f"{where} {losses} {rate:.0f} tok/s threads {threads}", flush=True)
            if time.time() - last_save > 180:
                save()
                last_save = time.time()
    except KeyboardInterrupt:
        print("interrupted; continue with --resume", flush=True)
    save()


if __name__ == "__main__":
    main()
