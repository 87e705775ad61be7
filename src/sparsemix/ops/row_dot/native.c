// z_nr = <x_n, table[ids_nr]>. Threads share the picks evenly, so that one token is enough for all of them.
#ifndef ROW
#include "native.h"
#define ROW float
#define OF(name) name##_f32
#include "native.c"
#undef ROW
#undef OF
#define ROW bf16
#define OF(name) name##_bf16
#include "native.c"
#else
#include "rows.h"

void OF(row_dot)(const ROW *x, const int64_t *ids, const ROW *table, float *z, int64_t N, int64_t R, int64_t D,
                 int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < threads; t++)
        OF(dot_range)(x, ids, table, R, D, part(N * R, SIDE, t, threads), part(N * R, SIDE, t + 1, threads), z);
}
#endif
