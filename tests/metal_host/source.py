"""The text MLX generates for a kernel, and its translation into what clang's OpenCL mode accepts.

Every change keeps lines where they are, so that line numbers need no table.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from .errors import MetalCompileError

# Kept because tests put the executor in its place.
mlx_metal_kernel = mx.fast.metal_kernel


def generated_text(call: Callable[[list[mx.array]], Any], shapes: Sequence[tuple[Sequence[int], mx.Dtype]]) -> str:
    """The exact source that MLX builds for this call, which it also does where there is no Metal."""
    found: list[str] = []

    def node(record: dict[str, Any]) -> None:
        if record.get("type") == "primitive" and record["name"] == "CustomKernel":
            found.append(record["arguments"][1])

    inputs = [mx.zeros(shape, dtype) for shape, dtype in shapes]
    mx.export_function(node, lambda *arrays: call(list(arrays)), *inputs)
    return found[0]


@dataclass(frozen=True)
class Parameter:
    """One buffer of the kernel; `pointer` is false for a reference (a 0-d input)."""

    name: str
    type: str
    space: str
    pointer: bool


@dataclass
class Source:
    """A generated text, its parts, and the translation."""

    name: str
    text: str
    header: str
    body: str
    fast_math: bool = False
    function: str = ""
    parameters: list[Parameter] = field(default_factory=list)
    translated: str = ""
    libraries: dict[bool, Path] = field(default_factory=dict)  # compiled so far, by trace mode

    def __post_init__(self) -> None:
        self._body_line = self.text[: self.text.rfind(self.body)].count("\n") + 1
        masked = _mask_comments(self.text)
        self._lint(masked)
        masked = self._parse_signature(masked)
        self.translated = self._translate(masked) + self._entry

    def where(self, line: int) -> str:
        """A line of the text in the terms of the person who wrote it."""
        code = self.text.split("\n")[line - 1].strip() if 0 < line <= self.text.count("\n") + 1 else ""
        if self._body_line <= line <= self._body_line + self.body.count("\n"):
            return f"source line {line - self._body_line + 1}: `{code}`"
        if line <= self.header.count("\n") + 1:
            return f"header line {line}: `{code}`"
        return f"generated line {line}: `{code}`"

    def error(self, line: int, what: str) -> MetalCompileError:
        return MetalCompileError(f"kernel '{self.name}': {what}, {self.where(line)}")

    def _lint(self, masked: str) -> None:
        for pattern, what in (
            (r"\bthread_elements\b", "thread_elements() depends on which lane holds what, which Apple does not say"),
            (r"\b(?:try|catch|throw|dynamic_cast|typeid|new|delete|goto|virtual)\b", "not in the Metal language"),
            (r"\b__(?:global|local|private|generic|constant)\b", "an OpenCL address space, not one of Metal"),
            (r"\bmh_\w+", "names that begin with mh_ belong to the executor"),
        ):
            if found := re.search(pattern, masked):
                line = masked.count("\n", 0, found.start()) + 1
                raise self.error(line, f"`{found.group()}`: {what}")

    def _parse_signature(self, masked: str) -> str:
        found = re.search(r"\[\[kernel\]\] void (\w+)\(", masked)
        assert found, self.text
        self.function = found.group(1)
        self._body_start = masked.index(") {", found.end())
        signature = masked[found.end() : self._body_start]
        arguments = []
        buffers = re.compile(r"(?:const )?(device|constant) ([\w:<> ]+?)([*&]) (\w+) \[\[buffer\((\d+)\)\]\]")
        attributes = re.compile(r"^\s*(\w+) (\w+) \[\[(\w+)\]\]", re.M)
        for space, type_, kind, name, index in buffers.findall(signature):
            self.parameters.append(Parameter(name, type_, space, kind == "*"))
            star = "" if kind == "*" else "*"
            arguments.append(f"{star}({space} {type_}*)mh_buffers[{index}]")
        for type_, _, attribute in attributes.findall(buffers.sub("", signature)):
            arguments.append(f"{type_}(mh_at.{attribute})" if type_ != "uint3" else f"mh_at.{attribute}")
        instance = self.function
        # clang wants no attributes on an explicit instantiation; calling the function instantiates it.
        if tail := re.search(r"^template \[\[host_name.*decltype\((.*)\) .*$", masked, re.M):
            instance = tail.group(1)
            masked = masked[: tail.start()] + masked[tail.end() :]
        self._entry = (
            '\n#line 1 "mh_entry"\n'
            'extern "C" void mh_entry(__private const ulong* mh_buffers, __private const mh_thread& mh_at) {\n'
            f"  {instance}({', '.join(arguments)});\n}}\n"
        )
        return masked

    def _translate(self, masked: str) -> str:
        masked = re.sub(r"^[ \t]*#[ \t]*include[ \t]*<metal_\w+>.*$", "", masked, flags=re.M)
        masked = self._threadgroup_variables(masked)
        masked = re.sub(r"\bstatic_cast\s*<", "mh_cast<", masked)
        vector = r"(?:metal::)?(?:vec\s*<[^;{}()]*>|(?:float|half|bfloat|u?int|u?short|u?char|u?long)[234])"
        for found in re.findall(rf"\busing\s+(\w+)\s*=\s*{vector}\s*;|\btypedef\s+{vector}\s+(\w+)\s*;", masked):
            name = found[0] or found[1]
            masked = re.sub(rf"\b{name}\s*\(", f"metal::make_as<{name}>(", masked)
        return re.sub(r"\b(?:metal::)?vec\s*<([^<>;{}()]*)>\s*\(", r"metal::make_vec<\1>(", masked)

    def _threadgroup_variables(self, masked: str) -> str:
        """Threadgroup variables become references into the executor's arena."""
        type_ = r"(?:(?:const|volatile|unsigned|signed|struct)\s+)*[\w:]+(?:\s*<[^;{}()]*?>)?"
        one = r"\w+(?:\s*\[[^\]]*\])*"
        count = 0

        def replace(match: re.Match[str]) -> str:
            nonlocal count
            line = masked.count("\n", 0, match.start()) + 1
            if match.start() < self._body_start:
                raise self.error(line, "a threadgroup variable outside of a kernel function")
            if match.group("end") == "=":
                raise self.error(line, "a threadgroup variable cannot have an initialiser")
            out = []
            for name, dims in re.findall(r"(\w+)((?:\s*\[[^\]]*\])*)\s*(?:,|$)", match.group("names")):
                out.append(f"auto& {name} = metal::mh_threadgroup<{match.group('type')}{dims}>({count});")
                count += 1
            return " ".join(out)

        pattern = rf"\bthreadgroup\s+(?P<type>{type_})\s+(?P<names>{one}(?:\s*,\s*{one})*)\s*(?P<end>;|=)"
        return re.sub(pattern, replace, masked)


def _mask_comments(text: str) -> str:
    """Comments as blanks, strings untouched."""
    pattern = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.S)
    return pattern.sub(lambda m: m.group() if m.group()[0] == '"' else re.sub(r"[^\n]", " ", m.group()), text)
