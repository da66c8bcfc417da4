"""What xet's local store holds: its shards say which file of which sha256 has which hash of theirs.

A shard is a row of 48-byte records: a header, then for each file its hash, flags and number of segments, the segments,
as many verifications if bit 31 is set, and the sha256 if bit 30 is; a hash of ones ends them. Hashes are written as
four little-endian words of 64 bits.
"""

import struct
from pathlib import Path

RECORD = 48
VERIFIED, HAS_SHA256 = 1 << 31, 1 << 30


def _hex(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def known_files(store: Path) -> dict[str, str]:
    """sha256 -> xet's hash, of every file uploaded to `store`."""
    found = {}
    for shard in store.rglob("*"):
        if shard.is_file() and shard.suffix in (".mdb", ".shard"):
            found |= _files(shard.read_bytes())
    return found


def _files(shard: bytes) -> dict[str, str]:
    found, position = {}, RECORD
    while position + RECORD <= len(shard):
        raw, flags, entries = struct.unpack_from("<32sII", shard, position)
        if raw == b"\xff" * 32:
            break
        position += RECORD * (1 + entries * (2 if flags & VERIFIED else 1))
        if flags & HAS_SHA256:
            found[_hex(shard[position : position + 32])] = _hex(raw)
            position += RECORD
    return found
