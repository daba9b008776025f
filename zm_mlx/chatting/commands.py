"""The lines that begin with a slash."""

from ..errors import UserError
from ..report import size
from ..terminal import say
from . import bar
from .session import Session

COMMANDS = {
    "/stats": "show what the conversation holds: rows of the budget, tokens, bytes",
    "/save FILE": "save the conversation (FILE.safetensors), for /load or --prompt-cache-file",
    "/load FILE": "go on with a saved conversation or prompt, instead of this one",
    "/reset": "begin a new conversation with the same system prompt",
    "/system TEXT": "begin a new conversation with another system prompt; without TEXT show the present one",
    "/help": "show this",
    "/exit": "leave, as Ctrl-D does",
}
TYPING = (
    'A line that ends in a backslash goes on in the next one; a block begins and ends with a line of """.',
    "Ctrl-C ends an answer and keeps the conversation. A space before a slash makes a message of the line.",
)


def run(line: str, session: Session) -> bool:
    """Do what a command says.

    Returns:
        Whether the chat goes on.

    Raises:
        UserError: there is no such command, or it does not work.
    """
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    takes = next((usage.partition(" ")[2] for usage in COMMANDS if usage.split()[0] == name), None)
    if takes is None:
        raise UserError(f"there is no command {name} (/help lists them; with a space before it, it is a message)")
    if rest and not takes:
        raise UserError(f"{name} takes nothing, not {rest!r}")
    if takes == "FILE" and not rest:
        raise UserError(f"{name} needs the name of a file")
    if name == "/stats":
        caches, turns = session.conversation.caches, session.conversation.standing.turns
        say("\n".join(bar.lines(caches, session.plan_of_caches.nbytes, turns, session.context)))
    elif name == "/save":
        say(f"Saved: {facts(session)} in {session.save(rest)}")
    elif name == "/load":
        session.load(rest)
        say(f"Loaded: {facts(session)}")
    elif name == "/reset":
        session.begin(session.conversation.standing.system)
        say("A new conversation.")
    elif name == "/system":
        _system(session, rest)
    elif name == "/help":
        width = max(map(len, COMMANDS)) + 2
        say("\n".join([*(f"{usage:<{width}}{words}" for usage, words in COMMANDS.items()), *TYPING]))
    return name != "/exit"


def _system(session: Session, text: str) -> None:
    if not text:
        say(session.conversation.standing.system or "There is no system prompt of yours.")
        return
    if not session.templated:
        raise UserError("/system needs a chat template, which this model does not have")
    session.begin(text)
    say("A new conversation, with this system prompt.")


def facts(session: Session) -> str:
    """How long the conversation is, in words."""
    conversation = session.conversation
    tokens, turns = conversation.seen, conversation.standing.turns
    return f"{tokens:,} tokens of {turns:,} turns, {size(conversation.caches.nbytes)}"
