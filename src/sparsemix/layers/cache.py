"""Keys and values of earlier tokens: one store per attention layer, ragged, because routed layers see fewer tokens."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Slots that a store begins with; it doubles when a row outgrows it.
FIRST_SLOTS = 16


@dataclass
class Store:
    """Slot s of row r holds the s-th token that this layer saw of row r. The last slot takes filling."""

    k: Float[Tensor, "R H S d"]
    v: Float[Tensor, "R H S d"]
    positions: Int[Tensor, "R S"]
    doc_ids: Int[Tensor, "R S"]
    lengths: Int[Tensor, " R"]

    @classmethod
    def empty(cls, num_rows: int, like: Float[Tensor, "B H T d"]) -> "Store":
        shape = (num_rows, like.shape[1], FIRST_SLOTS, like.shape[3])
        ids = torch.zeros(num_rows, FIRST_SLOTS, dtype=torch.long, device=like.device)
        return cls(like.new_zeros(shape), like.new_zeros(shape), ids, ids.clone(), ids[:, 0].clone())

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
        self.positions, self.doc_ids = longer(self.positions, 1), longer(self.doc_ids, 1)


class Cache:
    """What the attention layers of one model have seen of `num_rows` sequences, by layer path.

    A key keeps the rotation of its original position; which slot it lies in depends on how many tokens its layer
    took before it. `seen` counts every real token of a row, routed or not."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.stores: dict[str, Store] = {}
        self.seen = torch.zeros(num_rows, dtype=torch.long)

    def advance(self, valid: Bool[Tensor, "B T"] | None, T: int, rows: Int[Tensor, " B"] | None) -> Int[Tensor, "B T"]:
        """Positions of the next T tokens of `rows`: real ones count on from where their row stands."""
        rows = torch.arange(self.num_rows) if rows is None else rows.cpu()
        real = torch.ones(len(rows), T, dtype=torch.bool) if valid is None else valid.cpu()
        positions = self.seen[rows, None] + real.cumsum(1) - 1
        self.seen[rows] += real.sum(1)
        return positions.clamp_min(0)

    def append(
        self,
        path: str,
        rows: Int[Tensor, " B"] | None,
        k: Float[Tensor, "B H T d"],
        v: Float[Tensor, "B H T d"],
        positions: Int[Tensor, "B T"],
        doc_ids: Int[Tensor, "B T"] | None,
        valid: Bool[Tensor, "B T"] | None,
        window: int | None = None,
    ) -> tuple[Float[Tensor, "B H S d"], Float[Tensor, "B H S d"], Bool[Tensor, "B 1 T S"]]:
        """Store the real tokens behind what their rows hold; then everything these rows hold, and which key each
        query sees: those at its own slot or before, of its document, fewer than `window` positions back."""
        if path not in self.stores:
            self.stores[path] = Store.empty(self.num_rows, k)
        store = self.stores[path]
        B, _, T, _ = k.shape
        rows = torch.arange(B, device=k.device) if rows is None else rows
        real = torch.ones(B, T, dtype=torch.bool, device=k.device) if valid is None else valid
        docs = torch.zeros_like(real, dtype=torch.long) if doc_ids is None else doc_ids
        before = store.lengths[rows]
        store.grow(int((before + real.sum(1)).max()))
        scratch = store.positions.shape[1] - 1
        slots = torch.where(real, before[:, None] + real.cumsum(1) - 1, scratch)  # (B, T)
        at = rows[:, None].expand_as(slots)
        store.k[at, :, slots] = k.transpose(1, 2)
        store.v[at, :, slots] = v.transpose(1, 2)
        store.positions[at, slots] = positions.expand(B, T)
        store.doc_ids[at, slots] = docs.expand(B, T)
        store.lengths[rows] = before + real.sum(1)
        S = int(store.lengths[rows].max().clamp_min(1))
        mask = torch.arange(S, device=k.device) <= slots[:, :, None]  # (B, T, S)
        mask = mask & (store.doc_ids[rows, None, :S] == docs[:, :, None])
        if window is not None:
            mask = mask & (positions[:, :, None] - store.positions[rows, None, :S] < window)
        # A filling query sees everything: its softmax stays finite and nobody reads it.
        mask = mask | ~real[:, :, None]
        return store.k[rows, :, :S], store.v[rows, :, :S], mask[:, None]

    def lengths(self, path: str) -> Int[Tensor, " R"]:
        """How many tokens of each row this layer holds."""
        store = self.stores.get(path)
        return torch.zeros(self.num_rows, dtype=torch.long) if store is None else store.lengths.cpu()

    def bytes(self) -> int:
        """Bytes of the keys and values that are held; room kept for growth does not count."""
        return sum(
            2 * int(s.lengths.sum()) * s.k.shape[1] * s.k.shape[3] * s.k.element_size() for s in self.stores.values()
        )

    def reorder(self, rows: Int[Tensor, " R"]) -> None:
        """Row r becomes what row rows[r] was (beam search; the number of rows may change)."""
        self.num_rows, self.seen = len(rows), self.seen[rows.cpu()]
        for store in self.stores.values():
            for name, tensor in vars(store).items():
                setattr(store, name, tensor[rows])

    def crop(self, length: int) -> None:
        """Forget every token at position `length` or later (rejected drafts)."""
        self.seen.clamp_(max=length)
        for store in self.stores.values():
            held = torch.arange(store.positions.shape[1], device=store.k.device) < store.lengths[:, None]
            store.lengths = (held & (store.positions < length)).sum(1)
