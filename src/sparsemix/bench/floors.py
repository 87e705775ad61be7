"""What the ratios must reach, and what they reach for: one table, read by the harness and the page."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Floor:
    """`least` is to be met, `goal` to be reached for; `at_most` where a smaller number is better."""

    least: float
    goal: float | None = None
    at_most: bool = False

    def met(self, value: float) -> bool:
        return value <= self.least if self.at_most else value >= self.least


# By the id of a number: the name of its work, a stroke, and what is compared.
FLOORS = {
    "peer_step/512 tokens": Floor(8, 15),
    "peer_step/4096 tokens": Floor(4, 6),
    "peer_forward/512 tokens": Floor(2.5, 4),
    "peer_forward/share of random reads": Floor(0.60, 0.80),
    "peer_memory/full moments": Floor(0.65, 0.60, at_most=True),
    "peer_memory/row-wise second moment": Floor(0.35, 0.30, at_most=True),
    "product_key_topk/8192 rows": Floor(4, 8),
    "moe_experts/E=64": Floor(1.0, 1.2),
    "moe_experts/E=256": Floor(2, 3),
    "moe_experts/E=1024": Floor(5, 10),
    "moe_dense/E=8 bf16": Floor(0.80, 0.95),
    "moe_dense/E=64 bf16": Floor(0.80, 0.95),
    # Where the processor emulates bf16, the dense chain in bf16 is no measure.
    "moe_dense/E=8 fp32": Floor(0.80, 0.95),
    "moe_dense/E=64 fp32": Floor(0.80, 0.95),
    "mod_step/share of the FLOP ratio": Floor(0.85, 0.95),
    "ternary_mm/one row": Floor(3, 6),
    "decoding/mod batch 1": Floor(1.5, 1.7),
    "decoding/kv batch 1": Floor(1.05, 1.0, at_most=True),
    "decoding/ternary": Floor(3, 5),
    "decoding/ternary memory": Floor(6),
    "decoding/ternary disk": Floor(6),
    "decoding/generate batch 1 float32": Floor(1.0),
    "decoding/generate batch 4 float32": Floor(1.0),
    "decoding/generate batch 1 bfloat16": Floor(1.0),
    "decoding/generate batch 4 bfloat16": Floor(1.0),
    "dense_step/training step": Floor(1.0),
    # The growth of the step over the growth of its formula, from the first size to the last; a tenth is noise.
    "scaling/tokens": Floor(1.1, at_most=True),
    "scaling/experts": Floor(1.1, at_most=True),
    "scaling/heads * k": Floor(1.1, at_most=True),
    "scaling/batch": Floor(1.1, at_most=True),
    # Seconds per FLOP over dense's, a kind of routed layers and one of looked-up rows.
    **{
        f"main_job/{kind}, width {width}, {threads}": floor
        for floor, kinds in (
            (Floor(1.15, 1.05, at_most=True), ("moe", "mh_moe", "mode", "expert_choice", "mod")),
            (Floor(1.5, 1.2, at_most=True), ("peer", "pkm")),
        )
        for kind in kinds
        for width in (64, 128, 256)
        for threads in ("1 thread", "2 threads")
    },
}
