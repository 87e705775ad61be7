"""What every op and every C kernel takes, in order: operands.py reads and checks it.

`name:type[axes]`, or `name:type(elements)` where only their number counts; a plain name is a number, which is a size.
An axis is a size, the same wherever its name stands, one worked out from others, or `*`. `?` marks what may be None,
`<M` numbers from 0 to M - 1, `^` numbers that rise, `#R` rows of each expert, R at most in all. Types: F is a floating
type, one for all that have it, so G and H; I is any integer; T is fp32 or bf16, as a kernel's name or its number `low`
says. Triton's kernels are given what the op takes, with its strides or made contiguous."""

ORDER = "rows:i64[U]^<M starts:i64[U+1]^<P+1 picks:i64[P]<N*R"
EXPERTS = "ids:i64[R] gates:f32[R] counts:i64[E] first:T[E (1+gated)*F D] down:T[E D F] N E D F kind gated low"
PICKS = "ids:i64[N R] gates:f32[N R]"
PICKED_SCORES = "d_left:F[N H K] d_right:F[N H K]"
FACTORS = "rows:i64[U] starts:i64[U+1] picks:i64[*] coef:f32[* R] vec:f32[* D]"
ADAM = "rate beta1 beta2 root eps decay"
# The header of a row and whole steps of four quarters: native.c's row_of.
TERNARY_ROWS = "rows:i8(N*(64+256*-(-D//256)))"
PACKED = "packed:u8(E*F*-(-D//4))"

# The operands of each op, as its callers give them.
OPS = {
    "cross_entropy": "hidden:F[N D] weight:G[V D] targets:i64[N]",
    "expert_mlp": "tokens:F[N D] token_ids:I[R]<N gates:G[R] counts:I[E]#R first:F[E M D] down:F[E D F]",
    "expert_mlp_backward": "dy:F[N D] pre:F[R M] tokens:F[N D] token_ids:I[R]<N gates:G[R] counts:I[E]#R "
    "first:F[E M D] down:F[E D F]",
    "grouped_mm": "rows:F[R D] weight:F[E F D] counts:I[E]#R",
    "grouped_mm_weight_grad": "grad:F[R F] rows:F[R D] counts:I[E]#R",
    "peer_experts": "x:F[N D] ids:I[N R]<M gates:G[N R] w_in:F[M D] w_out:F[M D]",
    "peer_experts_backward": "d_y:F[N D] ids:I[N R]<M gates:G[N R] z:G[N R] w_in:F[M D] w_out:F[M D]",
    "product_key_topk": "query:F[N H 2 C] keys:F[2 n C]",
    "product_key_topk_by_head": "query:F[N H 2 C] keys:F[H 2 n C]",
    "product_key_topk_backward": f"{PICKED_SCORES} query:F[N H 2 C] keys:F[2 n C] i:I[N H K]<n j:I[N H K]<n",
    "product_key_topk_backward_by_head": f"{PICKED_SCORES} query:F[N H 2 C] keys:F[H 2 n C] i:I[N H K]<n j:I[N H K]<n",
    "best_pairs": "left:F[N n] right:F[N n]",
    "row_adam": f"table:F[M D] first:G[M D] second:G[M D] decayed:f64[M]? seen:u8[M]? coef:H[N R] vec:H[N D] {ORDER}",
    "row_adam_by_row": "table:F[M D] first:G[M D] second:G[M] decayed:f64[M]? seen:u8[M]? coef:H[N R] vec:H[N D] "
    f"{ORDER}",
    "row_dot": "x:F[N D] ids:I[N R]<M table:F[M D]",
    "row_mix": "coef:F[N R] ids:I[N R]<M table:F[M D]",
    "row_norm": "coef:F[N R] vec:F[N D] rows:i64[U]^ starts:i64[U+1]^<P+1 picks:i64[P]<N*R",
    "row_table_grad": "coef:F[N R] ids:I[N R] vec:F[N D]",
    "ternary_mm": "row_codes:i8[N D] packed:u8[F -(-D//4)]",
    "ternary_grouped_mm": "row_codes:i8[N D] packed:u8[E F -(-D//4)] counts:I[E]#N",
    "quantised_mm": "x:F[N D] packed:u8[F -(-D//4)] scale:G[M]",
    "quantised_grouped_mm": "x:F[N D] packed:u8[E F -(-D//4)] scale:G[E M] counts:I[E]#N",
}
# The arguments of each C kernel, without the number of threads; index ranges were checked as the op's.
KERNELS = {
    "bench.read_rows": "table:f32[* D] ids:i64[R] out:f32[R] R D",
    "bench.read_sequential": "table:f32(n) out:f32[*] n",
    "cross_entropy.nats": "logits:T[N V] targets:i64[N] share:f32[]? nats:f32[N] N V",
    "expert_mlp.forward": f"y:T[N D] pre:T[R (1+gated)*F]? tokens:T[N D] {EXPERTS}",
    "expert_mlp.backward": "d_tokens:T[N D]? d_gates:f32[R] d_first:T[E (1+gated)*F D]? d_down:T[E D F]? dy:T[N D] "
    f"pre:T[R (1+gated)*F] tokens:T[N D] {EXPERTS}",
    "grouped_mm.product": "out:T[R F] rows:T[R K] weight:T(E*F*K) counts:i64[E] R E F K turned low",
    "grouped_mm.weight_grad": "out:T[E F D] grad:T[R F] rows:T[R D] counts:i64[E] E F D low",
    "peer_experts.forward": f"x:T[N D] {PICKS} w_in:T[M D] w_out:T[M D] y:T[N D] z:f32[N R] coef:f32[N R] N R D kind",
    "peer_experts.backward": f"d_y:T[N D] {PICKS} z:f32[N R] w_in:T[M D] w_out:T[M D] d_x:T[N D] d_gates:f32[N R] "
    "d_z:f32[N R] coef:f32[N R] N R D kind",
    "product_key_topk.product_key_topk": "query:f32(N*groups*2*C) keys:f32(groups*2*n*C) N groups n C k a:i64[P] "
    "b:i64[P] P left:f32(N*groups*k) right:f32(N*groups*k) i:i64(N*groups*k) j:i64(N*groups*k)",
    "product_key_topk.product_key_topk_backward": "query:f32[N H 2 C] keys:f32(groups*2*n*C) d_left:f32[N H k] "
    "d_right:f32[N H k] i:i64[N H k] j:i64[N H k] N H groups n C k d_query:f32[N H 2 C] d_keys:f32(groups*2*n*C)",
    "product_key_topk.best_pairs": "left:f32(N*n) right:f32(N*n) N n k a:i64[P] b:i64[P] P i:i64(N*k) j:i64(N*k)",
    "row_adam.some_rows": f"table:T[M D] first:f32[M D] second:f32(M*(by_row or D)) decayed:f64[M]? {FACTORS} "
    f"U R D by_row {ADAM}",
    "row_adam.all_rows": f"table:T[M D] first:f32[M D] second:f32(M*(by_row or D)) seen:u8[M]? {FACTORS} "
    f"U M R D by_row {ADAM}",
    "row_dot.row_dot": "x:T[N D] ids:i64[N R] table:T[* D] z:f32[N R] N R D",
    "row_grad.sort_rows": "ids:i64[P] P M rows:i64[P+1] starts:i64[P+1] picks:i64[P+1] found:i64[1]",
    "row_grad.row_norm_sq": f"{FACTORS} U N R D out:f64[]",
    "row_grad.table_grad": f"{FACTORS} U R D out:T[* D]",
    "row_mix.row_mix": "coef:f32[N R] ids:i64[N R] table:T[* D] y:T[N D] N R D",
    "ternary_mm.ternary_sums": f"codes:i8[N D] {PACKED} counts:i64[E]? {TERNARY_ROWS} out:i32[N F] N D F E",
    "ternary_mm.ternary_values": f"x:T[N D] {PACKED} scale:f32(E*matrices) counts:i64[E]? {TERNARY_ROWS} out:T[N F] "
    "N D F E matrices",
}
