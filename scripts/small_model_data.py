"""Text, tokenizer and documents for the small model, all of them a function of a seed.

Text comes from permissively licensed sources only:

- the standard library of the Python that runs the script (PSF-2.0);
- the source distributions in ``SOURCES`` (code and reStructuredText manuals), fetched with pip.

Three kinds of documents are drawn, each exactly ``length`` tokens long:

- text: a stretch of one file;
- copy: random tokens or a stretch of text, then the same again;
- retrieval: text with facts between its lines (``The code for Bramelu is 40713.``), each asked for
  later. Facts and questions carry no loss, only answers do: the model learns to answer, and never
  to bring up a fact unasked, so plain text does not drift into facts.

Files and names for evaluation are chosen by a hash and never appear in training.
"""

import hashlib
import subprocess
import sys
import sysconfig
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SOURCES = {  # source distribution: licence
    "Django==5.2": "BSD-3-Clause",
    "SQLAlchemy==2.0.40": "MIT",
    "sphinx==8.2.3": "BSD-2-Clause",
    "pytest==8.3.5": "MIT",
    "Flask==3.1.0": "BSD-3-Clause",
    "Werkzeug==3.1.3": "BSD-3-Clause",
    "Jinja2==3.1.6": "BSD-3-Clause",
    "click==8.1.8": "BSD-3-Clause",
    "attrs==25.3.0": "MIT",
    "tornado==6.4.2": "Apache-2.0",
    "networkx==3.4.2": "BSD-3-Clause",
    "requests==2.32.3": "Apache-2.0",
    "Twisted==24.11.0": "MIT",
}
TEXT_SUFFIXES = {".py", ".rst", ".txt", ".md"}
SKIPPED_FOLDERS = {"locale", "lib2to3", "site-packages", "encodings", "__pycache__", "static"}
BOS, EOS = 0, 1

TEMPLATES = (  # (statement up to the value, what follows the value)
    ("The code for {n} is ", "."),
    ("The secret number of {n} is ", "."),
    ("{n} has the access key ", "."),
    ("Remember that {n} lives at number ", "."),
    ("{n} = ", "\n"),
    ("The password of {n} was set to ", "."),
    ("Note: the serial of {n} reads ", "."),
    ("{n}: ", "\n"),
    ("The phone extension of {n} is ", "."),
    ("PIN[{n}] = ", ";"),
    ('"{n}": ', ","),
    ("According to the register, {n} holds account ", "."),
    ("{n}'s locker number is ", "."),
    ("The magic number for {n} is ", "."),
)
QUESTIONS = (
    "Question: what is stored for {n}? Answer: ",
    "Q: {n}?\nA: ",
    "What is the number of {n}? It is ",
    "As stated above, {n} goes with ",
)


def held_out(text: str, per_mille: int) -> bool:
    """Whether a file or a name belongs to evaluation; a fixed hash, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 1000 < per_mille


def read_corpus(folder: Path) -> list[tuple[str, str]]:
    """(path, text) of every usable file, sorted; downloads the source distributions once."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    for requirement in SOURCES:
        name, version = requirement.split("==")
        archive = folder / f"{name.lower()}-{version}.tar.gz"
        if not archive.exists():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--no-binary", ":all:", "-d", folder, requirement], check=True)
            (found,) = [p for p in folder.iterdir() if p.name.lower() == archive.name]
            found.rename(archive)
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                if member.isfile() and usable(Path(member.name), member.size):
                    stream = tar.extractfile(member)
                    assert stream is not None
                    files[member.name] = stream.read().decode("utf-8", "replace")
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        relative = path.relative_to(library)
        if usable(relative, path.stat().st_size) and "test" not in relative.parts:
            files[f"python/{relative}"] = path.read_text("utf-8", "replace")
    return [(p, t) for p, t in sorted(files.items()) if t.isascii() or t.count("�") == 0]


def usable(path: Path, size: int) -> bool:
    """Text of a size worth learning from, outside data-like folders."""
    return path.suffix in TEXT_SUFFIXES and 2_000 < size < 400_000 and not SKIPPED_FOLDERS.intersection(path.parts)


def train_tokenizer(texts: list[str], vocab_size: int = 2048) -> Tokenizer:
    """Byte-level BPE with single digits, ``<s>`` = 0 first, ``</s>`` = 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


class Names:
    """Random names in six styles; those of evaluation never meet those of training."""

    def __init__(self, words: list[str], evaluation: bool):
        self.words, self.evaluation = words, evaluation

    def draw(self, rng: np.random.Generator) -> str:
        while True:
            name = self._any(rng)
            if held_out(name, 200) == self.evaluation:
                return name

    def _any(self, rng: np.random.Generator) -> str:
        style = int(rng.integers(6))
        if style == 0:
            return self._syllables(rng).capitalize()
        if style == 1:
            return f"{self._syllables(rng).capitalize()} {self._syllables(rng).capitalize()}"
        if style == 2:
            return f"{self._word(rng)} {self._word(rng)}"
        if style == 3:
            return f"{self._word(rng)}_{self._word(rng)}"
        if style == 4:
            return self._word(rng).capitalize()
        return f"{self._word(rng)}-{rng.integers(100)}"

    def _word(self, rng: np.random.Generator) -> str:
        return self.words[int(rng.integers(len(self.words)))]

    def _syllables(self, rng: np.random.Generator) -> str:
        def one() -> str:
            return str(rng.choice(list("bcdfghjklmnprstvwz"))) + str(rng.choice(list("aeiouy")))

        return "".join(one() for _ in range(int(rng.integers(2, 4)))) + str(rng.choice(["", "n", "r", "x", "l", "s"]))


@dataclass
class Query:
    """Where an evaluation question ends and what must follow (token ids, ``<space>digits``)."""

    tokens: list[int]
    answer: list[int]
    template: int


class Documents:
    """Draws documents as (tokens [length + 1], loss weight of predicting tokens[1:])."""

    def __init__(self, tokenizer: Tokenizer, files: list[tuple[str, str]], evaluation: bool = False):
        self.tokenizer = tokenizer
        chosen = [t for p, t in files if held_out(p, 25) == evaluation]
        encoded = tokenizer.encode_batch(chosen, add_special_tokens=False)
        self.files = [np.array(e.ids, np.int64) for e in encoded]
        sizes = np.array([len(f) for f in self.files], np.float64)
        self.share = sizes / sizes.sum()
        words = {w for t in chosen[:400] for w in t.split() if w.isalpha() and w.islower() and 4 <= len(w) <= 9}
        self.names = Names(sorted(words), evaluation)
        newline = [i for t, i in tokenizer.get_vocab().items() if "Ċ" in t]
        self.ends_line = np.zeros(tokenizer.get_vocab_size(), bool)
        self.ends_line[newline] = True

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def stretch(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """``length`` consecutive tokens of text; short files are joined by ``</s> <s>``."""
        parts: list[np.ndarray] = []
        have = 0
        while have < length:
            file = self.files[int(rng.choice(len(self.files), p=self.share))]
            start = int(rng.integers(max(1, len(file) - length))) if rng.random() < 0.7 else 0
            part = file[start : start + length - have]
            parts += [part, np.array([EOS, BOS])]
            have += len(part) + 2
        return np.concatenate(parts)[:length]

    def text(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.concatenate([[BOS], self.stretch(rng, length)])
        return tokens, np.ones(length, np.float32)

    def copy(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        period = int(rng.integers(length // 8, length // 2))
        unit = rng.integers(2, len(self.ends_line), period) if rng.random() < 0.5 else self.stretch(rng, period)
        tokens = np.concatenate([[BOS], np.tile(unit, length // period + 1)])[: length + 1]
        weights = np.ones(length, np.float32)
        weights[:period] = 0
        return tokens, weights

    def value(self, rng: np.random.Generator) -> str:
        digits = int(rng.choice([5, 5, 5, 3, 4, 6, 7, 8]))
        return "".join(str(d) for d in rng.integers(0, 10, digits))

    def facts(self, rng: np.random.Generator, count: int, digits: int | None = None) -> list[tuple[str, str]]:
        names: list[str] = []
        while len(names) < count:
            name = self.names.draw(rng)
            if names and rng.random() < 0.15:  # confusable: shares a word with an earlier name
                other = names[int(rng.integers(len(names)))].split()[0]
                twin = f"{other} {name}"
                name = twin if held_out(twin, 200) == self.names.evaluation else name
            if name not in names:
                names.append(name)
        if digits is None:
            return [(n, self.value(rng)) for n in names]
        return [(n, "".join(str(d) for d in rng.integers(0, 10, digits))) for n in names]

    def retrieval(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        most = max(2, min(32, length // 60))
        facts = self.facts(rng, int(rng.integers(1, most + 1)))
        template = int(rng.integers(len(TEMPLATES)))
        mixed = rng.random() < 0.2
        templates = [int(rng.integers(len(TEMPLATES))) if mixed else template for _ in facts]
        lead = ["\n", "\n\n", " ", "\n"][int(rng.integers(4))]
        form = int(rng.integers(len(QUESTIONS))) if rng.random() < 0.25 else None
        exam = rng.random() < 0.5
        # Where facts stand and where questions are asked, as fractions of the document.
        stated = np.sort(rng.random(len(facts))) * (rng.uniform(0.05, 0.75) if exam else 0.85)
        events: list[tuple[float, int, bool]] = [(float(s), i, False) for i, s in enumerate(stated)]
        if exam:
            start = max(float(stated.max()), rng.uniform(0.3, 0.92))
            if rng.random() < 0.4:
                asked = np.linspace(start, 0.97, len(facts) + 1)[1:]
            else:
                asked = rng.uniform(start, 1, len(facts))
            events += [(float(a), int(i), True) for a, i in zip(asked, rng.permutation(len(facts)), strict=True)]
        else:
            for a in rng.random(int(len(facts) * rng.uniform(0.7, 1.8)) + 1):
                known = int(np.searchsorted(stated, a))
                if known:
                    events.append((float(a), int(rng.integers(known)), True))
        events.sort(key=lambda e: e[0])

        pieces: list[tuple[float, list[int], list[float]]] = []
        for at, i, ask in events:
            (name, value), (before, after) = facts[i], TEMPLATES[templates[i]]
            if ask and form is not None:
                before, after = QUESTIONS[form], "\n"
            question = self.encode(lead + before.format(n=name).rstrip(" "))
            spaced = self.encode((" " if before.endswith(" ") else "") + value)
            rest = self.encode(after)
            weights = [0.0] * len(question) + [2.0 if ask else 0.0] * len(spaced) + [1.0 if ask else 0.3] * len(rest)
            pieces.append((at, question + spaced + rest, weights))
        total = sum(len(p[1]) for p in pieces)
        filler = self.stretch(rng, max(1, length - total))
        line_ends = np.flatnonzero(self.ends_line[filler]) + 1
        tokens: list[int] = [BOS]
        weights: list[float] = [1.0]
        at_filler = 0
        for at, piece, piece_weights in pieces:
            cut = int(at * len(filler))
            if line_ends.size:
                cut = int(line_ends[min(np.searchsorted(line_ends, cut), line_ends.size - 1)])
            cut = max(cut, at_filler)
            tokens += filler[at_filler:cut].tolist() + piece
            # The token after an inserted sentence is not predictable text; the rest is.
            weights += [0.7] * (cut - at_filler) + piece_weights
            at_filler = cut
        tokens += filler[at_filler:].tolist()
        weights += [0.7] * (len(filler) - at_filler)
        tokens, weights = tokens[: length + 1], weights[: length + 1]
        short = length + 1 - len(tokens)
        tokens, weights = tokens + [EOS] * short, weights + [0.0] * short
        return np.array(tokens, np.int64), np.array(weights[1:], np.float32)

    def examination(
        self, rng: np.random.Generator, distance: int, template: int, facts: int = 8, digits: int = 5
    ) -> tuple[list[int], list[Query]]:
        """One document and a question for each of its facts, about ``distance`` tokens after them.

        The facts stand in random gaps of text within ± 15 % of the distance (at most ± 250 tokens).
        Each question is asked on its own after the document, so one prefill serves them all.
        """
        known = self.facts(rng, facts, digits)
        before, after = TEMPLATES[template]
        spread = min(int(distance * 0.15), 250)
        offsets = np.sort(rng.integers(-spread, spread + 1, facts))
        tokens: list[int] = [BOS, *self.stretch(rng, int(rng.integers(16, 128))).tolist()]
        for (name, value), gap in zip(known, np.diff(offsets, prepend=offsets[0]), strict=True):
            sentence = self.encode("\n" + before.format(n=name) + value + after)
            tokens += self.stretch(rng, int(gap)).tolist() + sentence if gap else sentence
        middle = len(tokens) - spread
        tail = self.stretch(rng, max(8, distance - (len(tokens) - middle))).tolist()
        tokens += tail
        queries = []
        for name, value in known:
            question = self.encode("\n" + before.format(n=name).rstrip(" "))
            answer = self.encode((" " if before.endswith(" ") else "") + value)
            queries.append(Query(question, answer, template))
        return tokens, queries
