"""Makes small shards for the tests."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image


def picture(color="red", size=(20, 10), mode="RGB", kind="PNG") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, color).save(out, kind)
    return out.getvalue()


def write(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def shard(path: Path, count: int = 5) -> Path:
    """`count` plain pictures with two captions each."""
    members = {}
    for i in range(count):
        members[f"{i:04}.png"] = picture(color=(40 * i % 256, 100, 200))
        members[f"{i:04}.json"] = json.dumps({"captions": [f"picture {i}", f"number {i}"]}).encode()
    return write(path, members)
