"""Damage bytes of known formats, by seed: parsers pass the first check and meet nonsense later."""

import json
import random
from typing import Any

_PLAIN: list[Any] = [None, True, False, [], {}, [[]], {"id": {}}]
_TEXTS = [
    "1",
    "1.0",
    "0",
    "x",
    "",
    "\ud800",
    "\x1b[2J",
    "../../x",
    "a\0b.jpg",
    "9" * 5000,
    "x" * 100_000,
]
_WHOLE = [0, -1, 2**31, 2**63, 2**64 - 1, 2**70, 10**30, 10**400, -(10**30)]
_REAL = [0.5, 1.0, 1e308, float("inf"), float("nan")]
HOSTILE: tuple[Any, ...] = (*_PLAIN, *_TEXTS, *_WHOLE, *_REAL)


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def bytes_of(data: bytes, rng: random.Random) -> bytes:
    """The data with one to four pieces changed."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not out:
            break
        at = rng.randrange(len(out))
        size = min(rng.choice((1, 1, 2, 4, 8, 100, 512, 2000)), len(out) - at)
        match rng.randrange(7):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + size] = rng.randbytes(size)
            case 2:
                out[at : at + size] = bytes(size)
            case 3:
                out[at : at + size] = b"\xff" * size
            case 4:
                del out[at : at + size]
            case 5:
                out[at:at] = out[at : at + size]
            case 6:
                del out[at:]
    return bytes(out)


def tar_of(data: bytes, rng: random.Random) -> bytes:
    """A tar with a field of a header changed, and the header's checksum made right again."""
    out = bytearray(data)
    headers = [at for at in range(0, len(out) - 511, 512) if out[at + 257 : at + 262] == b"ustar"]
    at = rng.choice(headers)
    match rng.randrange(7):
        case 0:  # a size of 256-based digits: negative, or larger than anything
            out[at + 124 : at + 136] = rng.choice(
                (b"\xff" * 11 + bytes([rng.randrange(256)]), b"\x80" + rng.randbytes(11))
            )
        case 1:
            out[at + 124 : at + 135] = b"%011o" % rng.choice((0, 1, 511, 10**6, 2**33 - 1))
        case 2:
            out[at + 156] = rng.choice(b"\x000123456789gxLKSVANX\xff")
        case 3:
            out[at : at + 100] = rng.choice(
                (
                    rng.randbytes(100),
                    bytes(100),
                    b"a" * 100,
                    b"../" * 33 + b"a",
                    b"/0.jpg".ljust(100, b"\0"),
                )
            )
        case 4:
            out[at + 157 : at + 257] = rng.randbytes(100)
        case 5:  # records of a pax header, GNU's sparse map, a long name
            body = rng.choice(
                (
                    b"30 GNU.sparse.map=0,1,2,9999,x\n",
                    b"22 size=-5\n",
                    b"999999999 path=a\n",
                    b"x",
                    b"27 GNU.sparse.size=99999999\n",
                )
            )
            out[at + 512 : at + 512 + len(body)] = body
        case 6:
            out[at + 386 : at + 512] = rng.randbytes(126)
    if rng.random() < 0.9:
        out[at + 148 : at + 156] = b"        "
        out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out) if rng.random() < 0.8 else bytes_of(bytes(out), rng)


def parquet_of(data: bytes, rng: random.Random) -> bytes:
    """A Parquet file with bytes of its footer changed, or any."""
    if rng.random() < 0.3:
        return bytes_of(data, rng)
    length = int.from_bytes(data[-8:-4], "little")
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = len(out) - 8 - rng.randrange(length)
        out[at] = rng.choice(
            (
                out[at] ^ (1 << rng.randrange(8)),
                rng.randrange(256),
                0,
                0x7F,
                0xFF,
                out[at] + 2 & 0xFF,
            )
        )
    return bytes(out)


def json_of(data: bytes, rng: random.Random) -> bytes:
    """A JSON with a value changed, left out or moved, or its bytes damaged."""
    if rng.random() < 0.15:
        return bytes_of(data, rng)
    if rng.random() < 0.02:
        return nested(100_000)
    root = json.loads(data)
    for _ in range(rng.randint(1, 2)):
        holder: Any = {"root": root}
        key: Any = "root"
        while isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.85:
            holder = holder[key]
            key = (
                rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
            )
        if holder is root and isinstance(root, list | dict) and rng.random() < 0.1:
            del holder[key]
        elif key != "root":
            holder[key] = rng.choice(HOSTILE)
        else:
            root = rng.choice(HOSTILE)
    text = json.dumps(root)
    if rng.random() < 0.1:
        text = text.replace("1", rng.choice(("1e999", "1" * 5000, "1" * 20)), 1)
    deep = nested(rng.choice((900, 2000, 100_000))).decode()
    return (text.replace("0", deep, 1) if rng.random() < 0.05 else text).encode(
        "utf-8", "surrogatepass"
    )
