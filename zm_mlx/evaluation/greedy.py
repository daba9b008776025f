"""An answer as greedy decoding gives it, under the cap of the caches."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .prefilled import continue_
from .subject import Subject


def answer(subject: Subject, caches: list[Any], last: int, most: int, until: Sequence[str] = ()) -> str:
    """The text of up to ``most`` tokens after ``last``: to the end of the sequence, or before a text of ``until``.

    Args:
        caches: have seen the prompt without its last token.
        last: the prompt's last token.
    """
    tokenizer, tokens = subject.tokenizer, list[int]()
    ends = set(tokenizer.eos_token_ids)
    while len(tokens) < most:
        last = int(np.array(continue_(subject.model, caches, [last]).argmax(axis=-1))[0])
        if last in ends:
            break
        tokens.append(last)
        if until and any(x in tokenizer.decode(tokens) for x in until):
            break
    text = str(tokenizer.decode(tokens))
    return text[: min((i for x in until if (i := text.find(x)) >= 0), default=len(text))]
