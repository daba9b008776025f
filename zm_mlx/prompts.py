"""From what a user gives as a prompt to token ids: files, standard input, chat templates, continued prompts."""

import sys
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError

# What ``render`` or mlx-lm's tokenizer sets itself.
RESERVED = {
    "add_generation_prompt",
    "continue_final_message",
    "conversation",
    "messages",
    "return_dict",
    "return_tensors",
    "tokenize",
}
QUERY, ANSWER = "<query>", "<answer>"


@dataclass(frozen=True)
class Chat:
    """What a chat template gets beside the prompt; ``ignore`` leaves the template out."""

    system: str | None = None
    response: str | None = None  # how the answer begins
    options: Mapping[str, Any] = field(default_factory=dict)
    ignore: bool = False


def read(text: str | None, file: str | None) -> str:
    """The prompt that ``--prompt`` (``text``) or ``--prompt-file`` (``file``) brings; ``-`` is standard input.

    Raises:
        UserError: it cannot be read, is not text in UTF-8, or is empty.
    """
    source = "--prompt" if file is None else f"--prompt-file {file}"
    if file is not None and file != "-":
        try:
            found = _decode(Path(file).read_bytes(), source)
        except OSError as error:
            raise UserError(f"{source}: {error.strerror or error}") from error
    elif file == "-" or text == "-":
        source = "--prompt -" if file is None else source
        found = _decode(_standard_input(source), source)
    else:
        found = text or ""
        encodable(source, found)
    found = found.lstrip("\ufeff")  # a byte-order mark is no text
    if "\0" in found:
        raise UserError(f"{source}: this is a binary file, not text")
    if not any(_visible(character) for character in found):
        raise UserError(f"{source}: the prompt is empty")
    return found


def encodable(source: str, text: str) -> None:
    """Refuse what no tokenizer takes: bytes of the command line (or escapes in JSON) that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{source}: not text in UTF-8 (character {error.start} cannot be read)") from error


def encode(tokenizer: Any, prompt: str, chat: Chat) -> list[int]:
    """Token ids of a prompt of its own, through the chat template where there is one, as mlx-lm does it."""
    if not uses_template(tokenizer, chat):
        return _some(tokenizer.encode(prompt))
    return _some(_ids(tokenizer, _render(tokenizer, prompt, chat)))


def encode_open(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt whose rest comes later: no end of the message, and no end of sequence."""
    if tokenizer.has_chat_template:
        opening = [{"role": "user", "content": prompt}]
        return _some(_ids(tokenizer, _apply(tokenizer, opening, {}, continues=True)))
    ids, plain = _some(tokenizer.encode(prompt)), _ids(tokenizer, prompt)
    for begin in range(len(ids) - len(plain) + 1):
        if ids[begin : begin + len(plain)] == plain:
            return ids[: begin + len(plain)]
    return ids


def encode_rest(tokenizer: Any, prompt: str, chat: Chat) -> list[int]:
    """Token ids of what continues a saved prompt: without a beginning of sequence and the template's opening.

    Raises:
        UserError: the chat is to open in another way than the saved one did.
    """
    if not uses_template(tokenizer, chat):
        return _some(_ids(tokenizer, prompt))
    query = _render(tokenizer, QUERY, chat)
    opening, found, _ = query.partition(QUERY)
    plain, _, _ = _render(tokenizer, QUERY, Chat(response=chat.response)).partition(QUERY)
    if not found:
        raise UserError("--prompt-cache-file: this chat template does not show the prompt as it is, so it cannot go on")
    if opening != plain:
        raise UserError(
            "--chat-template-config changes what comes before the prompt, which --prompt-cache-file holds already"
        )
    return _some(_ids(tokenizer, _render(tokenizer, prompt, chat)[len(opening) :]))


def encode_next(tokenizer: Any, prompt: str, chat: Chat, stop: int | None) -> list[int]:
    """Token ids of the turn after an answer: the end of the answer's turn, then the prompt's.

    The chat template renders a conversation in which the answer is a stand-in, and the turn is what follows that.
    So it is the same whatever the template makes of earlier turns in a later prompt, and however long they are.
    Without a template the prompt begins a new line.

    Args:
        stop: the token that ended the answer, which is not given once more; ``None`` if the answer was cut off.

    Raises:
        UserError: the template does not show an answer as it is.
    """
    if not uses_template(tokenizer, chat):
        return _some(_ids(tokenizer, "\n" + prompt))
    _, found, turn = _apply(tokenizer, _turns(ANSWER, prompt), chat.options, continues=False).partition(ANSWER)
    if not found:
        raise UserError("this chat template does not show an answer as it is, so a conversation cannot go on after one")
    ids = _some(_ids(tokenizer, turn))
    if stop in ids:
        end = ids.index(stop)
        if not tokenizer.decode(ids[:end]).strip():  # it ends the answer, not what comes later
            return ids[end + 1 :]
    return ids


def rewrites(tokenizer: Any, chat: Chat) -> bool:
    """Whether a chat template shows a turn otherwise once others follow, such as an answer without its thinking."""
    if not uses_template(tokenizer, chat):
        return False
    thinking = f"{tokenizer.think_start}{QUERY}{tokenizer.think_end}" if tokenizer.has_thinking else ""
    first, *others = _turns(thinking + ANSWER, QUERY)
    system = [] if chat.system is None else [{"role": "system", "content": chat.system}]
    before = _apply(tokenizer, [*system, first], chat.options, continues=False)
    after = _apply(tokenizer, [*system, first, *others], chat.options, continues=False)
    return not after.startswith(before + thinking + ANSWER)


def _turns(answer: str, prompt: str) -> list[dict[str, str]]:
    """A conversation up to a prompt."""
    roles = (("user", QUERY), ("assistant", answer), ("user", prompt))
    return [{"role": role, "content": content} for role, content in roles]


def uses_template(tokenizer: Any, chat: Chat) -> bool:
    """Whether the prompt goes through a chat template.

    Raises:
        UserError: there is none, or it is ignored, and something else was given that needs it.
    """
    if tokenizer.has_chat_template and not chat.ignore:
        return True
    given = {
        "--system-prompt": chat.system is not None,
        "--prefill-response": chat.response is not None,
        "--chat-template-config": bool(chat.options),
    }
    for name in (name for name, there in given.items() if there):
        raise UserError(f"{name} needs a chat template: this model has none, or it is ignored")
    return False


def _render(tokenizer: Any, content: str, chat: Chat) -> str:
    messages = [{"role": "user", "content": content}]
    if chat.system is not None:
        messages.insert(0, {"role": "system", "content": chat.system})
    if chat.response is not None:
        messages.append({"role": "assistant", "content": chat.response})
    return _apply(tokenizer, messages, chat.options, continues=chat.response is not None)


def _apply(tokenizer: Any, messages: list[dict[str, str]], options: Mapping[str, Any], *, continues: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, continue_final_message=continues, add_generation_prompt=not continues, **options
        )
    except Exception as error:  # a template is a program, and refuses in its own words
        raise UserError(f"the chat template of the model refuses this: {type(error).__name__}: {error}") from error
    if not isinstance(text, str):
        raise UserError(f"--chat-template-config: the chat template gives {type(text).__name__}, not text")
    encodable("the text of the chat template", text)
    return text


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _some(ids: Iterable[int]) -> list[int]:
    """The tokens, if there are any: tokenizers may drop characters that they do not know."""
    if found := list(ids):
        return found
    raise UserError("the prompt is empty: this model's tokenizer makes no tokens of it")


def _standard_input(source: str) -> bytes:
    if sys.stdin is None:
        raise UserError(f"{source}: standard input is closed")
    try:
        return sys.stdin.buffer.read()
    except (OSError, ValueError) as error:  # a closed file is a ValueError
        raise UserError(f"{source}: standard input cannot be read ({error})") from error


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not text in UTF-8 (byte {error.start} cannot be read)") from error


def _visible(character: str) -> bool:
    return not character.isspace() and unicodedata.category(character) != "Cf"
