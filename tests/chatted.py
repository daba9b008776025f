"""What the tests of the chat share: a tiny random model that notes its tokens, a chat template, and written answers."""

from dataclasses import dataclass

import mlx.core as mx
import tiny
from mlx_lm.models import llama
from mlx_lm.utils import load_tokenizer

from zm_mlx.chatting.conversation import Conversation
from zm_mlx.chatting.standing import Standing
from zm_mlx.engine import Engine, Settings
from zm_mlx.flags import DEFAULT_MODEL
from zm_mlx.host import caches
from zm_mlx.host.caches import Wish

VOCABULARY = 2048  # of the small model's tokenizer

# Each message is one line between special tokens, and the end of a turn is the model's end of sequence.
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
# As many models that think: all answers but the last are shown without their thinking.
THOUGHTLESS = TEMPLATE.replace(
    "{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'].split('~')[-1] }}"
)


class Noting(llama.Model):
    """A model that notes the tokens of its calls in ``fed``, a list of lists."""

    def __call__(self, inputs, cache=None, **more):
        self.fed.append(inputs[0].tolist())
        return super().__call__(inputs, cache=cache, **more)


@dataclass
class Written:
    """In place of a sampler: the tokens to come, whatever the model says."""

    tokens: list[int]

    def sampler(self, _tokenizer):
        rest = iter(self.tokens)
        return lambda _: mx.array([next(rest, 0)])


def tokenizer(template=TEMPLATE):
    made = load_tokenizer(DEFAULT_MODEL)
    if template is not None:
        made.chat_template = template
        made.has_chat_template = True
    return made


def engine(template=TEMPLATE, **more):
    """A tiny random model with the small model's tokenizer; ``engine.model.fed`` lists its calls."""
    model = tiny.model(vocab=VOCABULARY, **more)
    model.__class__ = Noting
    model.fed = []
    return Engine(model, tokenizer(template), "tiny")


def conversation(made, rows=64, standing=None, policy=None):
    """A new conversation; what was noted while it was prepared is forgotten."""
    found = caches.fresh(made.model, "zeromerge", Wish(str(rows), "streaming", None, policy=policy), None, 0)
    made.model.fed.clear()
    return Conversation(made, found, standing or Standing())


def say(talk, text, answer=None, *, most=8, step=2048, stopped=lambda: False):
    """Tokens of the answer to a turn: greedy ones, or as written, to their end."""
    settings = Settings(most, step) if answer is None else Settings(len(answer) + 1, step, Written(answer))
    return [r.token for r in talk.answer(talk.encode(text), settings, stopped)]


def fed(made):
    """All tokens that the model has seen, in order."""
    return [token for call in made.model.fed for token in call]
