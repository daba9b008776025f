"""Lines of machine instructions: the DWARF 4 line table of an ELF library."""

import struct
from bisect import bisect_right
from pathlib import Path


class LineTable:
    """`find` gives the (file, line) of an offset in the library, or None."""

    def __init__(self, library: Path) -> None:
        self._rows: list[tuple[int, str, int]] = []
        data = _section(library.read_bytes(), b".debug_line")
        at = 0
        while at + 4 < len(data):
            size = struct.unpack_from("<I", data, at)[0]
            self._program(data[at + 4 : at + 4 + size])
            at += 4 + size
        self._rows.sort()

    def find(self, offset: int) -> tuple[str, int] | None:
        i = bisect_right(self._rows, (offset, chr(0x10FFFF), 0)) - 1
        return self._rows[i][1:] if i >= 0 and self._rows[i][2] > 0 else None

    def _program(self, unit: bytes) -> None:
        header_size = struct.unpack_from("<I", unit, 2)[0]
        step, _, _, line_base, line_range, opcode_base = struct.unpack_from("<BBBbBB", unit, 6)
        counts = unit[12 : 12 + opcode_base - 1]
        at = 12 + opcode_base - 1
        while unit[at]:  # directories
            at = unit.index(b"\0", at) + 1
        at += 1
        files = ["?"]
        while unit[at]:
            end = unit.index(b"\0", at)
            files.append(unit[at:end].decode())
            at = end + 1
            for _ in range(3):
                _, at = _leb(unit, at)
        at = 6 + header_size
        address, file, line = 0, 1, 1
        while at < len(unit):
            op = unit[at]
            at += 1
            if op >= opcode_base:
                address += (op - opcode_base) // line_range * step
                line += line_base + (op - opcode_base) % line_range
                self._rows.append((address, files[file], line))
            elif op == 0:
                size, at = _leb(unit, at)
                if unit[at] == 2:
                    address = int.from_bytes(unit[at + 1 : at + size], "little")
                elif unit[at] == 1:
                    self._rows.append((address, "", 0))
                    address, file, line = 0, 1, 1
                at += size
            elif op == 1:
                self._rows.append((address, files[file], line))
            elif op == 2:
                value, at = _leb(unit, at)
                address += value * step
            elif op == 3:
                value, at = _leb(unit, at, signed=True)
                line += value
            elif op == 4:
                file, at = _leb(unit, at)
            elif op == 8:
                address += (255 - opcode_base) // line_range * step
            elif op == 9:
                address += struct.unpack_from("<H", unit, at)[0]
                at += 2
            else:
                for _ in range(counts[op - 1]):
                    _, at = _leb(unit, at)


def _leb(data: bytes, at: int, signed: bool = False) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if not byte & 128:
            return (value - (1 << shift) if signed and byte & 64 else value), at


def _section(elf: bytes, wanted: bytes) -> bytes:
    table = struct.unpack_from("<Q", elf, 0x28)[0]
    entry, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * entry) for i in range(count)]
    strings = headers[names][4]
    for name, _, _, _, offset, size in headers:
        start = strings + name
        if elf[start : elf.index(b"\0", start)] == wanted:
            return elf[offset : offset + size]
    return b""
