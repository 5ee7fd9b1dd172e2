"""Images that are played: a small file that says with which key it opens, and what a guest would see in it.

They keep the promises of ``hypervisor.images`` that conversions lean on, and each of their effects can be an agent's
last.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from doubles.hosts import Fuse
from sealift.domain.conversion import DiskFacts
from sealift.errors import AlreadyExists, ConversionFailed
from sealift.hypervisor.images import FileId, ImageRef, Images, OnBytes
from sealift.secret import Secret


def image(content: str, dek: Secret | None) -> str:
    """What an image's file has in it."""
    return f"{dek.reveal().hex() if dek is not None else 'clear'}:{content}"


def opened(path: str | Path, dek: Secret | None) -> str:
    """What a guest would see; raises ConversionFailed when the key is another one."""
    key, content = Path(path).read_text().split(":")
    if key != image("", dek)[:-1]:
        raise ConversionFailed(f"{path} does not open with this key")
    return content


def _size(path: str) -> int:
    return os.stat(path).st_size if os.path.exists(path) else 0


class PlayedImages(Images):
    """``hypervisor.images.Images`` over such files."""

    def __init__(self, fuse: Fuse) -> None:
        super().__init__()
        self._fuse = fuse

    async def look(self, path: str, format: Literal["qcow2", "raw"]) -> DiskFacts:
        size = _size(path)
        return DiskFacts(path, size > 0, size, size, 1 << 30, "ext4")

    def _write(self, path: str, text: str) -> FileId:
        self._fuse.point(f"before making {path}")
        try:
            with open(path, "x") as file:
                file.write(text[: len(text) // 2])
                file.flush()
                self._fuse.point(f"while making {path}")
                file.write(text[len(text) // 2 :])
                made = os.fstat(file.fileno())
        except FileExistsError:
            raise AlreadyExists(f"there is a file at {path} already") from None
        self._fuse.point(f"after making {path}")
        return FileId(made.st_dev, made.st_ino)

    async def create(self, path: str, format: Literal["qcow2", "raw"], size_bytes: int, dek: Secret | None) -> FileId:
        return self._write(path, image("", dek))

    async def convert(self, source: ImageRef, target: ImageRef, on_bytes: OnBytes) -> FileId:
        made = self._write(target.path, image(opened(source.path, source.dek), target.dek))
        on_bytes(1, 1)
        return made

    async def verify(self, source: ImageRef, target: ImageRef, *, full: bool, on_bytes: OnBytes) -> None:
        if opened(source.path, source.dek) != opened(target.path, target.dek):
            raise ConversionFailed("they differ")
        on_bytes(1, 1)
