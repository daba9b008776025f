"""Texts that an evaluation reads: files and folders of a user, or what comes with every Python.

The prose of the default is the manual of the Python language that ``help()`` shows (``pydoc_data``), its code
the standard library, both under the PSF licence.
"""

import sysconfig
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal, NamedTuple

from ..errors import UserError

Kind = Literal["prose", "code"]

SUFFIXES = (".txt", ".md", ".html", ".htm", ".py")
CODE = (".py",)
HTML = (".html", ".htm")
MOST_BYTES = 16_000_000  # of a folder; more of it would only take time to read
LIBRARY = 24  # files of the standard library, evenly spread over those of a size worth reading
LIBRARY_BYTES = (20_000, 200_000)


class Text(NamedTuple):
    """One text, and whether it is prose or code."""

    name: str
    kind: Kind
    text: str


def read(paths: Sequence[str]) -> list[Text]:
    """The texts of files (any suffix) and of folders (those of ``SUFFIXES``), in the order of their names.

    Of folders with more than ``MOST_BYTES`` every n-th file is read.

    Raises:
        UserError: a path does not exist or cannot be read, or there is no text in any.
    """
    found = [text for path in paths for file in _files(path) if (text := _text(file)).text.strip()]
    if not found:
        raise UserError(f"--texts {' '.join(paths)}: no text in it; give files or folders of {', '.join(SUFFIXES)}")
    return found


def default() -> list[Text]:
    """The language manual and files of the standard library.

    Raises:
        UserError: this Python came without them.
    """
    topics = _topics()
    library = Path(sysconfig.get_path("stdlib"))
    least, most = LIBRARY_BYTES
    files = [p for p in sorted(library.glob("*.py")) if least < p.stat().st_size < most]
    found = [Text(f"topic {name}", "prose", topics[name]) for name in sorted(topics)]
    found += [_text(p) for p in files[:: max(1, len(files) // LIBRARY)]]
    if not found:
        raise UserError("this Python has neither its manual nor its library in files: give --texts")
    return found


def kind_of(path: Path) -> Kind:
    return "code" if path.suffix.lower() in CODE else "prose"


def plain(html: str) -> str:
    """The text of an HTML page: blocks as paragraphs, ``<pre>`` as it is, without scripts, styles and navigation."""
    parser = _Page()
    parser.feed(html)
    parser.close()
    paragraphs = (parser.text()).split("\n\n")
    return "\n\n".join(p.strip("\n") for p in paragraphs if p.strip())


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some systems package it apart
        return {}
    return topics


def _files(path: str) -> list[Path]:
    """The file itself, or those of a folder."""
    place = Path(path)
    if not place.exists():
        raise UserError(f"--texts {path}: no such file or folder")
    if not place.is_dir():
        return [place]
    files = sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    size = sum(p.stat().st_size for p in files)
    return files[:: 1 + size // MOST_BYTES]


def _text(path: Path) -> Text:
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--texts {path}: {error.strerror or error}") from error
    if "\0" in text:
        raise UserError(f"--texts {path}: this is a binary file, not text")
    text = text.lstrip("\ufeff").replace("\r\n", "\n")
    return Text(str(path), kind_of(path), plain(text) if path.suffix.lower() in HTML else text)


class _Page(HTMLParser):
    """Collects the text of a page."""

    SKIPPED = frozenset({"script", "style", "nav", "head", "template", "svg", "button"})
    BLOCKS = frozenset(
        "address article aside blockquote body dd div dl dt figcaption footer h1 h2 h3 h4 h5 h6 header hr li main ol p "
        "pre section table tr ul".split()
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._skipping: list[str] = []  # open elements that are left out
        self._as_it_is = 0  # open <pre>

    def text(self) -> str:
        return "".join(self._parts)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in self.SKIPPED:
            self._skipping.append(tag)
        elif tag == "br":
            self._parts.append("\n")
        elif tag in self.BLOCKS:
            self._parts.append("\n\n")
        self._as_it_is += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skipping:  # what it holds and does not close is left out with it
            del self._skipping[self._skipping.index(tag) :]
        if tag in self.BLOCKS:
            self._parts.append("\n\n")
        if tag == "pre":
            self._as_it_is = max(0, self._as_it_is - 1)

    def handle_data(self, data: str) -> None:
        if self._skipping:
            return
        if self._as_it_is:
            self._parts.append(data)
            return
        words = " ".join(data.split())
        if words or (data and self._parts and not self._parts[-1][-1:].isspace()):
            before = " " if data[:1].isspace() and self._parts and not self._parts[-1][-1:].isspace() else ""
            self._parts.append(before + words + (" " if words and data[-1:].isspace() else ""))
