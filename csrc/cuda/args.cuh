// One attention call as the kernels get it: pyattn/backends/cuda.py packs this struct. Names, shapes and meaning are
// those of pyattn/spec.py; an absent tensor is null. Strides count elements.
#pragma once

#include "hw.cuh"

// [b, heads, rows, size], with a last stride of 1.
struct Matrix {
    void* at;
    i64 batch, head, row;
};

// [1|b, 1|h, 1|m, 1|n], with a stride of 0 where it broadcasts.
struct ScoreTensor {
    void* at;
    i64 batch, head, query, key;
};

struct Args {
    // k and v are pages [pages, hk, page, size] where there is a block table.
    Matrix q, k, v, out, d_out, d_q, d_k, d_v;
    ScoreTensor mask, bias, d_bias;
    // [b, h, m] in the accumulator's type. row_max and log_sum are what the backward knows weights by (softmax.cuh).
    void *lse, *row_max, *log_sum, *delta;
    const void* d_lse;
    const int* key_lengths;               // [b]
    const void *q_segments, *k_segments;  // [b, m] and [b, n]; of 64 bits where wide_q_ids, wide_k_ids
    const float* slopes;                  // [sequences, h], with slope_stride between rows: 0 where all are the same
    const void* sinks;                    // [h], in the accumulator's type
    const u64* seed;                      // []
    const int *cu_q, *cu_k;               // [sequences + 1]
    const int* block_table;               // [b, n / page]
    // Of decoding: [chunks, b, h, m, dv] and [chunks, b, h, m], in the accumulator's type.
    void *part, *part_max, *part_sum;

    double scale;
    double magnitude;  // |scale|, over the softcap where there is one; positive also for scale 0
    double factor;     // from scores to logits: magnitude where nothing is added to q.k, else 1
    double unit;       // factor times log2(e)
    double softcap;    // 0: none
    double keep_scale;  // 1 / (1 - dropout_p)

    i64 slope_stride;

    int b, h, hk, m, n, d, dv;
    int sequences;  // how many are packed
    int pages, page;
    int offset, left, right;  // an absent limit is m + n, which hides nothing
    int cached;        // the offset is key_lengths[b] - m
    int sign;          // of the scale: -1, 0 or 1
    int aligned;       // rows of matrices begin at multiples of 16 bytes and consist of such
    int bias_is_float;  // the bias is float32, whatever q is
    int wide_q_ids, wide_k_ids;
    int bias_sums;  // which dimensions the bias's gradient sums over, bits SUM_BATCH ... (backward_bias.cuh)
    int chunks;
    u32 threshold;  // of dropout: a weight is kept when its word is at least this
};
static_assert(sizeof(Args) == 656, "pyattn/backends/cuda.py packs as many bytes");

// What a kernel is compiled with or without. All else is decided as it runs.
enum Flags {
    RICH = 1,     // mask, segments, bias, softcap and ALiBi
    DROPOUT = 2,
};
