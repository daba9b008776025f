"""Pieces of text for a calibration."""

from collections.abc import Callable, Sequence

from ..errors import UserError

CHARACTERS = 12  # a token has fewer, in any language and with any tokenizer that is of use


def pieces(encode: Callable[[str], list[int]], texts: Sequence[str], count: int, tokens: int) -> list[list[int]]:
    """``count`` pieces of so many tokens each, from equal parts of all texts, beginning with a line.

    Raises:
        UserError: the texts are too short.
    """
    whole = "\n\n".join(texts)
    place = len(whole) // count
    found = []
    for i in range(count):
        text = whole[i * place : (i + 1) * place]
        if i:
            text = text.partition("\n")[2] or text
        piece = encode(text[: CHARACTERS * tokens])[:tokens]
        if len(piece) < tokens:
            raise UserError(
                f"--texts: {len(whole):,} characters are too few for {count} pieces of {tokens} tokens; "
                "give longer ones, fewer --documents or fewer --prompt-tokens"
            )
        found.append(piece)
    return found
