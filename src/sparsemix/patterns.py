"""Block patterns, `blocks: {count, each, ffn, wrap}`, written out as a list: settings alone, no torch."""

import re
from typing import Any

from sparsemix.config import ConfigError

# No decoder has a tenth of it; a slip of the finger must not write a thousand million settings out.
MAX_BLOCKS = 10_000


def places(at: Any, count: int) -> list[int]:
    """Block positions: `every`, `every-N` (the last of each N: 1, 3, 5, ... for every-2), `middle` (count // 2), or
    a list. Raises ConfigError."""
    if at == "middle":
        return [count // 2]
    if at == "every":
        return list(range(count))
    if isinstance(at, str) and re.fullmatch(r"every-[1-9][0-9]{0,8}", at):
        every = int(at[6:])
        return list(range(every - 1, count, every))
    if isinstance(at, (list, tuple)) and all(isinstance(i, int) and 0 <= i < count for i in at):
        return list(at)
    raise ConfigError(
        f"at={str(at)[:100]} must be every, every-N, middle, or a list of block positions from 0 to {count - 1}"
    )


def expand_blocks(raw: dict[str, Any]) -> dict[str, Any]:
    """Settings of a model with a block pattern written out as a list.

    `blocks: {count: 4, each: {...}}` repeats a block; `ffn: {at: middle, kind: peer, ...}` replaces feed-forwards and
    `wrap: {at: every-2, kind: mod, ...}` wraps blocks, each one line. Raises ConfigError."""
    pattern = raw.get("blocks")
    if not isinstance(pattern, dict):
        return raw
    if unknown := set(pattern) - {"count", "each", "ffn", "wrap"}:
        raise ConfigError(f"blocks.{sorted(unknown)[0]} is no part of a pattern; known: count, each, ffn, wrap")
    count = pattern.get("count")
    if not isinstance(count, int) or not 1 <= count <= MAX_BLOCKS or not isinstance(pattern.get("each"), dict):
        rule = f"needs count (from 1 to {MAX_BLOCKS}) and each (the block to repeat)"
        raise ConfigError(
            f"a pattern of blocks {rule}; it has count={str(count)[:40]}, each={str(pattern.get('each'))[:40]}"
        )
    blocks: list[dict[str, Any]] = [dict(pattern["each"]) for _ in range(count)]
    for part in ("ffn", "wrap"):
        if part in pattern:
            if not isinstance(pattern[part], dict):
                raise ConfigError(f"blocks.{part}={str(pattern[part])[:100]} must be settings (a mapping with a kind)")
            settings = dict(pattern[part])
            for place in places(settings.pop("at", "every"), count):
                blocks[place] = (
                    {**blocks[place], "ffn": settings} if part == "ffn" else {**settings, "inner": blocks[place]}
                )
    return {**raw, "blocks": blocks}
