"""Keys and values of earlier tokens: one store per attention layer, ragged, because routed layers see fewer tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Result = TypeVar("Result")

# Slots that a store begins with; it doubles when a row outgrows it.
FIRST_SLOTS = 16


class Keys(NamedTuple):
    """What queries may attend to, and which key each one sees; mask None: all of them (one query), or the causal
    triangle (as many queries as keys)."""

    k: Float[Tensor, "B H S d"]
    v: Float[Tensor, "B H S d"]
    mask: Bool[Tensor, "b 1 T S"] | None


@dataclass
class Store:
    """Slot s of row r holds the s-th token that this layer saw of row r; the last slot takes filling. Lengths are plain
    numbers: a step reads no tensor to know them. `doc_ids` is there once a document was named."""

    k: Float[Tensor, "R H S d"]
    v: Float[Tensor, "R H S d"]
    positions: Int[Tensor, "R S"]
    doc_ids: Int[Tensor, "R S"] | None
    lengths: list[int]

    @classmethod
    def empty(cls, num_rows: int, like: Float[Tensor, "B H T d"]) -> "Store":
        shape = (num_rows, like.shape[1], FIRST_SLOTS, like.shape[3])
        positions = torch.zeros(num_rows, FIRST_SLOTS, dtype=torch.long, device=like.device)
        return cls(like.new_zeros(shape), like.new_zeros(shape), positions, None, [0] * num_rows)

    @property
    def alike(self) -> bool:
        """Does every row hold as many tokens, all of one document?"""
        return self.doc_ids is None and min(self.lengths) == max(self.lengths)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value."""
        return 2 * self.k.shape[1] * self.k.shape[3] * self.k.element_size()

    def grow(self, slots: int) -> None:
        """Room for `slots` tokens in every row."""
        have = self.positions.shape[1]
        if slots < have:
            return
        more = max(have, slots + 1 - have)

        def longer(tensor: Tensor, axis: int) -> Tensor:
            shape = list(tensor.shape)
            shape[axis] = more
            return torch.cat([tensor, tensor.new_zeros(shape)], axis)

        self.k, self.v = longer(self.k, 2), longer(self.v, 2)
        self.positions = longer(self.positions, 1)
        self.doc_ids = None if self.doc_ids is None else longer(self.doc_ids, 1)

    def append_alike(
        self, k: Float[Tensor, "R H T d"], v: Float[Tensor, "R H T d"], positions: Int[Tensor, "b T"]
    ) -> Keys:
        """T tokens behind what every row holds, the rows being `alike`: they lie in the same slots, side by side."""
        start, T = self.lengths[0], k.shape[2]
        end = start + T
        self.grow(end)
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        self.positions[:, start:end] = positions
        self.lengths = [end] * len(self.lengths)
        mask = None
        if T > 1 and start:
            mask = torch.ones(1, 1, T, end, dtype=torch.bool, device=k.device).tril(start)
        return Keys(self.k[:, :, :end], self.v[:, :, :end], mask)

    def append_ragged(
        self,
        rows: Int[Tensor, " B"] | None,
        k: Float[Tensor, "B H T d"],
        v: Float[Tensor, "B H T d"],
        positions: Int[Tensor, "b T"],
        doc_ids: Int[Tensor, "B T"] | None,
        valid: Bool[Tensor, "B T"] | None,
        window: int | None,
    ) -> Keys:
        """The real tokens of each of `rows` behind what that row holds."""
        B, _, T, _ = k.shape
        numbers = list(range(B)) if rows is None else rows.tolist()
        counts = [T] * B if valid is None else valid.sum(dim=1).tolist()
        before = [self.lengths[r] for r in numbers]
        after = [n + count for n, count in zip(before, counts, strict=True)]
        self.grow(max(after))
        order = torch.arange(T, dtype=torch.long, device=k.device) if valid is None else valid.cumsum(dim=1) - 1
        slots = torch.tensor(before, dtype=torch.long, device=k.device)[:, None] + order  # (B, T)
        if valid is not None:
            slots = torch.where(valid, slots, self.positions.shape[1] - 1)
        at = (torch.arange(B, dtype=torch.long, device=k.device) if rows is None else rows)[:, None].expand_as(slots)
        self.k[at, :, slots] = k.transpose(1, 2)
        self.v[at, :, slots] = v.transpose(1, 2)
        self.positions[at, slots] = positions.expand(B, T)
        if doc_ids is not None and self.doc_ids is None:
            self.doc_ids = torch.zeros_like(self.positions)
        docs = torch.zeros_like(slots) if doc_ids is None else doc_ids.expand(B, T)
        if self.doc_ids is not None:
            self.doc_ids[at, slots] = docs
        for r, n in zip(numbers, after, strict=True):
            self.lengths[r] = n
        S, mine = max(1, *after), slice(None) if rows is None else rows
        k, v = self.k[mine, :, :S], self.v[mine, :, :S]
        if T == 1 and min(after) == S and valid is None and self.doc_ids is None and window is None:
            return Keys(k, v, None)
        mask = torch.arange(S, dtype=torch.long, device=k.device) <= slots[:, :, None]  # (B, T, S)
        if self.doc_ids is not None:
            mask = mask & (self.doc_ids[mine, None, :S] == docs[:, :, None])
        if window is not None:
            mask = mask & (positions[:, :, None] - self.positions[mine, None, :S] < window)
        if valid is not None:
            # A filling query sees everything: its softmax stays finite and nobody reads it.
            mask = mask | ~valid[:, :, None]
        return Keys(k, v, mask[:, None])


class Held(NamedTuple):
    """Tokens whose keys and values a layer holds, all that the cache has seen, and the bytes of both."""

    tokens: int
    seen: int
    bytes: int
    dense_bytes: int


class Cache:
    """What the attention layers of one model have seen of `num_rows` sequences, by layer path.

    A key keeps the rotation of its original position; which slot it lies in depends on how many tokens its layer
    took before it. `seen` counts every real token of a row, routed or not."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.stores: dict[str, Store] = {}
        self.seen = torch.zeros(num_rows, dtype=torch.long)
        # Are all positions so far the number of real tokens before? Only then `crop` knows what to forget.
        self.counted = True
        self._step: tuple[Tensor | None, dict[Any, Any]] = (None, {})

    def advance(
        self,
        T: int,
        rows: Int[Tensor, " B"] | None = None,
        valid: Bool[Tensor, "B T"] | None = None,
        positions: Int[Tensor, "b T"] | None = None,
    ) -> Int[Tensor, "b T"]:
        """Positions of the next T tokens of `rows`: those given, else real tokens count on from where their row
        stands."""
        mine = slice(None) if rows is None else rows.cpu()
        real = None if valid is None else valid.cpu()
        before = self.seen[mine, None]
        self._step = (None, {})
        counted = before + (torch.arange(T, dtype=torch.long) if real is None else (real.cumsum(1) - 1).clamp_min(0))
        self.seen[mine] = before[:, 0] + (T if real is None else real.sum(1))
        if positions is None:
            return counted if valid is None else counted.to(valid.device)
        same = positions.cpu() == counted
        self.counted = self.counted and bool((same if real is None else same | ~real).all())
        return positions

    def once(self, compute: Callable[..., Result], positions: Int[Tensor, "b T"], *settings: Any) -> Result:
        """compute(positions, *settings), remembered while the layers of a step ask with the same positions."""
        if self._step[0] is not positions:
            self._step = (positions, {})
        known, key = self._step[1], (compute, *settings)
        if key not in known:
            known[key] = compute(positions, *settings)
        return known[key]

    def append(
        self,
        path: str,
        rows: Int[Tensor, " B"] | None,
        k: Float[Tensor, "B H T d"],
        v: Float[Tensor, "B H T d"],
        positions: Int[Tensor, "b T"],
        doc_ids: Int[Tensor, "B T"] | None,
        valid: Bool[Tensor, "B T"] | None,
        window: int | None = None,
    ) -> Keys:
        """Store the real tokens behind what their rows hold; then everything these rows hold. A query sees the keys at
        its own slot or before, of its document, fewer than `window` positions back."""
        store = self.stores.get(path)
        if store is None:
            store = self.stores[path] = Store.empty(self.num_rows, k)
        if all(given is None for given in (rows, doc_ids, valid, window)) and store.alike:
            return store.append_alike(k, v, positions)
        return store.append_ragged(rows, k, v, positions, doc_ids, valid, window)

    def lengths(self, path: str) -> Int[Tensor, " R"]:
        """How many tokens of each row this layer holds."""
        store = self.stores.get(path)
        return torch.zeros(self.num_rows, dtype=torch.long) if store is None else torch.tensor(store.lengths)

    def bytes(self) -> int:
        """Bytes of the keys and values that are held; room kept for growth does not count."""
        return sum(held.bytes for held in self.report().values())

    def report(self) -> dict[str, Held]:
        """What each layer holds, beside what it would hold had it taken every token. A layer that took none so far has
        no entry."""
        seen = int(self.seen.sum())
        return {
            path: Held(tokens, seen, tokens * store.token_bytes, seen * store.token_bytes)
            for path, store in self.stores.items()
            for tokens in [sum(store.lengths)]
        }

    def reorder(self, rows: Int[Tensor, " R"]) -> None:
        """Row r becomes what row rows[r] was (beam search; the number of rows may change)."""
        self.num_rows, self.seen = len(rows), self.seen[rows.cpu()]
        for store in self.stores.values():
            store.k, store.v, store.positions = store.k[rows], store.v[rows], store.positions[rows]
            store.doc_ids = None if store.doc_ids is None else store.doc_ids[rows]
            store.lengths = [store.lengths[r] for r in rows.tolist()]

    def crop(self, length: int | Int[Tensor, " R"]) -> None:
        """Forget every token of a row at position `length` or later; a row may have its own. Raises ValueError where
        positions were given that do not count the row's tokens: they cannot say what came last."""
        if not self.counted:
            raise ValueError("a cache that was given positions of its own cannot be cropped: let positions count on")
        limits = torch.as_tensor(length).expand(self.num_rows)
        self.seen = torch.minimum(self.seen, limits.cpu())
        for store in self.stores.values():
            slots = torch.arange(store.positions.shape[1], dtype=torch.long, device=store.k.device)
            held = slots < torch.tensor(store.lengths, dtype=torch.long, device=store.k.device)[:, None]
            kept = held & (store.positions < limits.to(store.k.device)[:, None])
            store.lengths = kept.sum(dim=1).tolist()

    def rollback(self, counts: int | Int[Tensor, " R"]) -> None:
        """Forget the last `counts` tokens of a row, whether a layer had routed them or not (rejected drafts)."""
        self.crop((self.seen - torch.as_tensor(counts).cpu()).clamp_min(0))
