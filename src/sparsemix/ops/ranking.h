// Scores in order: floats as integers, masks as bits, short and long lists from the largest on.
#pragma once
#include "native.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define SHORT 128  // lists up to this long are ordered by counting who comes before whom

// Integers that order as the floats do: -inf lowest, -0 equal to 0, every NaN highest.
static inline int32_t as_order(float x) {
    int32_t bits;
    x += 0.0f;  // -0 becomes 0
    memcpy(&bits, &x, 4);
    return x != x ? INT32_MAX : bits ^ ((bits >> 31) & INT32_MAX);
}

static inline uint64_t lane_bits(vi mask) {
#if defined(__AVX512DQ__)
    return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps((__m256)mask);
#else
    uint64_t bits = 0;
    for (int lane = 0; lane < W; lane++) bits |= (uint64_t)(mask[lane] & 1) << lane;
    return bits;
#endif
}

static inline vf larger(vf a, vf b) {  // b where either is NaN
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    vi first = a > b;
    return (vf)(((vi)a & first) | ((vi)b & ~first));
#endif
}

// A byte of the key as an unsigned number that is smallest for the largest key.
static inline uint32_t digit(int32_t key, int byte) { return (uint32_t)(key ^ INT32_MAX) >> byte & 255; }

// order[r] = which of m keys is the r-th largest, equal ones as they stand. Lists have room for a vector beyond.
static void arrange(int32_t *key, int64_t m, int32_t *order, int32_t *place, int32_t *spare) {
    if (m <= SHORT) {
        // place_i = #{j: key_j > key_i} + #{j < i: key_j = key_i}. No key is INT32_MIN, so key - 1 does not wrap.
        vi lanes;
        for (int lane = 0; lane < W; lane++) lanes[lane] = lane;
        for (int64_t i = 0; i < m; i += W) {
            vi mine = *(vi *)(key + i), count = {0};
            int64_t next = i + W < m ? i + W : m;
            for (int64_t j = 0; j < i; j++) count -= (vi)(key[j] - (vi){0} >= mine);
            for (int64_t j = i; j < next; j++) count -= (vi)(key[j] > mine + (lanes > (vi){0} + (int32_t)(j - i)));
            for (int64_t j = next; j < m; j++) count -= (vi)(key[j] - (vi){0} > mine);
            *(vi *)(place + i) = count;
        }
        for (int64_t i = 0; i < m; i++) order[place[i]] = i;
        return;
    }
    // Counting sort of one byte after the other, from the lowest; four passes end in `order`.
    int32_t *from = spare, *to = order;
    for (int64_t i = 0; i < m; i++) order[i] = i;
    for (int byte = 0; byte < 32; byte += 8) {
        int32_t start[257] = {0};
        int32_t *swap = from;
        from = to, to = swap;
        for (int64_t i = 0; i < m; i++) start[digit(key[i], byte) + 1]++;
        for (int d = 0; d < 256; d++) start[d + 1] += start[d];
        for (int64_t i = 0; i < m; i++) to[start[digit(key[from[i]], byte)]++] = from[i];
    }
}
