"""The library's ragged cache in the form that Hugging Face's `generate` handles."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import Cache

from sparsemix.layers import cache as layers_cache


class SparsemixCache(Cache):
    """What the attention layers saw of a batch, ragged. To `generate` its length is the number of columns of the batch
    that went in, padding too; `columns` (B, S) says which of them were real. Empty until a model sees it."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.held: layers_cache.Cache | None = None
        self.columns = torch.ones(0, 0, dtype=torch.bool)

    def extend(self, mask: Bool[Tensor, "B S"] | None, shape: torch.Size) -> layers_cache.Cache:
        """The store for the next (B, T) columns, the last of `mask` (None: all are real). Raises ValueError."""
        B, T = shape
        if self.held is None:
            self.held, self.columns = layers_cache.Cache(B), torch.ones(B, 0, dtype=torch.bool)
        if self.held.num_rows != B:
            raise ValueError(f"this cache holds {self.held.num_rows} sequences, not {B}; start a new one")
        S = self.columns.shape[1]
        real = torch.ones(B, T, dtype=torch.bool) if mask is None else mask[:, -T:].cpu()
        # What was cached as real stays so; single steps of `generate` only ever add to the mask.
        if mask is not None and T > 1 and mask.shape[1] == S + T and not torch.equal(mask[:, :S].cpu(), self.columns):
            raise ValueError(
                "attention_mask differs from the one that the cached tokens came with; pass that one with the new "
                "tokens' behind it, or start a new cache"
            )
        self.columns = torch.cat([self.columns, real], dim=1)
        return self.held

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: Int[Tensor, " R"]) -> None:
        """Row r becomes what row beam_idx[r] was."""
        if self.held is not None:
            self.held.reorder(beam_idx)
            self.columns = self.columns[beam_idx.cpu()]

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = torch.as_tensor(indices)
        self.reorder_cache(rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.held is not None:
            device = next((store.k.device for store in self.held.stores.values()), None)
            self.reorder_cache(torch.arange(self.held.num_rows, device=device).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove columns; a positive number is that of the columns to keep, as transformers
        before 5.24 asks."""
        S = self.get_seq_length()
        forgotten = max(0, S - tokens_to_remove) if tokens_to_remove > 0 else min(S, -tokens_to_remove)
        if forgotten == 0 or self.held is None:
            return
        self.held.rollback(self.columns[:, S - forgotten :].sum(dim=1))
        self.columns = self.columns[:, : S - forgotten]

    def reset(self) -> None:
        self.held, self.columns = None, self.columns[:, :0]

    def __len__(self) -> int:
        return 0 if self.held is None else len(self.held.stores)

    @property
    def batch_size(self) -> int:
        return -1 if self.held is None else self.held.num_rows

    @property
    def is_initialized(self) -> bool:
        return self.held is not None

    # One entry where transformers looks through its own layers, of which there are none.
    @property
    def is_linear(self) -> list[bool]:
        return [False]

    @property
    def is_sliding(self) -> list[bool]:
        return [False]
