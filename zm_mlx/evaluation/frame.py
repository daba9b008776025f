"""What a tokenizer and its chat template put around words."""

from dataclasses import dataclass
from typing import Any

MARKS = ("<first>", "<answer>", "<second>")
PLAIN = "\n\n"


@dataclass(frozen=True)
class Frame:
    """The text before, between and after what a user and a model say.

    Attributes:
        opening: before the user's first words.
        answer: between the user's words and the model's.
        turn: between the model's words and the user's next ones.
    """

    opening: str = ""
    answer: str = PLAIN
    turn: str = PLAIN

    @classmethod
    def of(cls, tokenizer: Any) -> "Frame | None":
        """That of the tokenizer's chat template; ``None`` without one, or where it does not show words as they are."""
        if not getattr(tokenizer, "has_chat_template", False):
            return None
        roles = zip(("user", "assistant", "user"), MARKS, strict=True)
        messages = [{"role": role, "content": mark} for role, mark in roles]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # a template is a program, and refuses in its own way
            return None
        parts: list[str] = []
        for mark in MARKS:
            before, found, text = text.partition(mark)
            if not found:
                return None
            parts.append(before)
        return cls(*parts)


def begins_with(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts before any text without a template, as a beginning of sequence."""
    plain, whole = list(tokenizer.encode("a", add_special_tokens=False)), list(tokenizer.encode("a"))
    for begin in range(len(whole) - len(plain) + 1):
        if whole[begin : begin + len(plain)] == plain:
            return whole[:begin]
    return []
