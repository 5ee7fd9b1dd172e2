"""A guest of a hundred bytes: it ticks on the serial console, and checks its memory while it dirties it.

Each tick prints the next letter of the alphabet, so that two consoles put end to end show a tick lost or doubled. Each
tick writes one page of a 16 MiB range with the number of the lap, having checked that the page holds the lap before;
it prints ``!`` when not. Started as a multiboot kernel (the Multiboot Specification 0.6.96, address fields in the
header), in 32-bit protected mode; needs no disk, no firmware call, no interrupt.
"""

from __future__ import annotations

import struct
from pathlib import Path

MEMORY_BYTES = 65528 << 10
"""Enough for it, and not a multiple of 256 KiB: QEMU 7.2's TCG loses track of dirty pages with such sizes."""

_LOAD, _FIRST_PAGE, _END_PAGE = 0x100000, 0x200000, 0x1200000
_MAGIC, _ADDRESSES_IN_HEADER = 0x1BADB002, 0x10000
_HEADER_BYTES = 32
_DELAY = 400_000  # rounds of an empty loop between ticks

_CODE = (
    b"\x31\xdb"  # xor ebx, ebx            lap
    b"\x31\xf6"  # xor esi, esi            letter
    b"\xbf%b"  # lap: mov edi, first page
    b"\x8d\x46\x61"  # page: lea eax, [esi + 'a']
    b"\x39\x1f"  # cmp [edi], ebx
    b"\x74\x02"  # je good
    b"\xb0\x21"  # mov al, '!'
    b"\x89\xc1"  # good: mov ecx, eax
    b"\x66\xba\xfd\x03"  # wait: mov dx, 0x3fd    line status
    b"\xec"  # in al, dx
    b"\xa8\x20"  # test al, 0x20           transmitter empty
    b"\x74\xf7"  # jz wait
    b"\x89\xc8"  # mov eax, ecx
    b"\x66\xba\xf8\x03"  # mov dx, 0x3f8
    b"\xee"  # out dx, al
    b"\x8d\x43\x01"  # lea eax, [ebx + 1]
    b"\x89\x07"  # mov [edi], eax
    b"\x46"  # inc esi
    b"\x83\xfe\x1a"  # cmp esi, 26
    b"\x75\x02"  # jne delay
    b"\x31\xf6"  # xor esi, esi
    b"\xb9%b"  # delay: mov ecx, rounds
    b"\xe2\xfe"  # loop here
    b"\x81\xc7\x00\x10\x00\x00"  # add edi, 4096
    b"\x81\xff%b"  # cmp edi, end page
    b"\x72%b"  # jb page
    b"\x43"  # inc ebx
    b"\xeb%b"  # jmp lap
)


def write(path: Path) -> Path:
    """Write the guest's kernel image to ``path``."""

    def word(value: int) -> bytes:
        return struct.pack("<I", value)

    # Lengths of the two backward jumps: from after the jump to the labels `page` and `lap`.
    length = len(_CODE % (word(0), word(0), word(0), b"\0", b"\0"))
    page, lap = 9, 4
    after_jb = length - 3
    code = _CODE % (
        word(_FIRST_PAGE),
        word(_DELAY),
        word(_END_PAGE),
        struct.pack("b", page - after_jb),
        struct.pack("b", lap - length),
    )
    checksum = -(_MAGIC + _ADDRESSES_IN_HEADER) & 0xFFFFFFFF
    end = _LOAD + _HEADER_BYTES + len(code)
    header = struct.pack("<8I", _MAGIC, _ADDRESSES_IN_HEADER, checksum, _LOAD, _LOAD, end, end, _LOAD + _HEADER_BYTES)
    path.write_bytes(header + code)
    return path


def check(console: bytes) -> None:
    """Assert that the ticks follow one another and that no check of the guest failed."""
    assert console, "the guest never ticked"
    assert b"!" not in console, "the guest found a page of its memory changed"
    first = console[0] - ord("a")
    for number, letter in enumerate(console):
        assert letter == ord("a") + (first + number) % 26, f"tick {number} of {len(console)} is out of turn"
