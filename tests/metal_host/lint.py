"""What clang's OpenCL mode accepts and Metal does not, found in clang's dump of the syntax tree."""

import re
from collections.abc import Iterator

MARKER = "mh_kernel_begins"
_NODE = re.compile(r"^([|`\- ]*)(\w+) (0x[0-9a-f]+) ?(.*)$")
_PLACE = re.compile(r"(?:(?P<file>[^\s<>:]+):(?P<line>\d+):\d+|\bcol:\d+)")


def complaints(dump: str) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) for each construct that Metal would refuse."""
    functions: list[tuple[int, str]] = []  # the functions around the current node: depth, address
    calls: dict[str, set[str]] = {}
    defined: dict[str, tuple[int, str]] = {}
    first: dict[str, str] = {}  # the first declaration of each redeclared function
    line = 0
    start = dump.find(MARKER)
    for text in dump[dump.index("\n", start) :].split("\n"):
        found = _NODE.match(text)
        if not found:
            continue
        prefix, kind, address, rest = found.groups()
        here = line
        for number, location in enumerate(_PLACE.finditer(rest.split("'")[0])):
            if location["line"]:
                line = int(location["line"])
            if number == 0:
                here = line
        while functions and functions[-1][0] >= len(prefix):
            functions.pop()
        if kind in ("FunctionDecl", "CXXMethodDecl", "CXXConstructorDecl"):
            if earlier := re.match(r"(?:parent \S+ )?prev (\S+)", rest):
                address = first.setdefault(address, first.get(earlier.group(1), earlier.group(1)))
            functions.append((len(prefix), address))
            called = re.search(r"([\w~]+|operator\S+) '", rest)
            defined[address] = (here, called.group(1) if called else "?")
        elif kind == "LambdaExpr":
            yield here, "lambdas are not in the Metal language"
        elif kind in ("VarDecl", "ParmVarDecl", "FieldDecl"):
            words, _, type_ = rest[rest.rindex(">", 0, rest.find("'")) + 1 : -1].partition(" '")
            name = re.sub(r"^ ?(?:<invalid sloc>|\S*:\S+)?(?: implicit)?(?: used| referenced)?", "", words).strip()
            if name and re.search(r"__generic [^()]*[*&]", type_):
                yield here, f"`{name}` is a pointer or reference without an address space"
        elif kind == "ImplicitCastExpr" and "<FloatingCast>" in rest and "part_of_explicit_cast" not in rest:
            if re.search(r"'(?:[^']*':')?(?:\w+ )?__bf16'", rest):
                yield here, "Metal has no implicit conversion from float to bfloat"
        elif kind == "CompoundAssignOperator" and re.search(r"'(?:[^']*':')?(?:\w+ )?__bf16'", rest):
            if re.search(r"ComputeResultTy='(?:float|half)'", rest):
                yield here, "Metal has no implicit conversion from float to bfloat"
        elif functions and kind in ("DeclRefExpr", "MemberExpr"):
            target = re.search(r"(?:Function|CXXMethod|->\w+|\.\w+) (0x[0-9a-f]+)", rest)
            if target:
                calls.setdefault(functions[-1][1], set()).add(first.get(target.group(1), target.group(1)))
    yield from _recursion(calls, defined)


def _recursion(calls: dict[str, set[str]], defined: dict[str, tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for address, (line, name) in defined.items():
        reached: set[str] = set()
        todo = list(calls.get(address, ()))
        while todo:
            target = todo.pop()
            if target not in reached:
                reached.add(target)
                todo.extend(calls.get(target, ()))
        if address in reached:
            yield line, f"`{name}` calls itself: Metal has no recursion"
