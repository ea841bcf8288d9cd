// Attention as it crosses the border between Python and the kernels: pointers, strides, sizes, flags.
// Names, shapes and meaning are those of pyattn/spec.py.
#pragma once

#include <cstdint>
#include <vector>

namespace pyattn {

enum class Dtype { float32, bfloat16, float16, float64 };

// No band on this side. Far beyond any length, yet safe to add to an index.
constexpr int64_t kUnlimited = int64_t{1} << 40;
constexpr int64_t kMaxHeadDim = 4096;

// A tensor of up to four dimensions; strides count elements. A null pointer means that the tensor is absent.
struct TensorArg {
    void* ptr = nullptr;
    int64_t size[4] = {1, 1, 1, 1};
    int64_t stride[4] = {0, 0, 0, 0};

    explicit operator bool() const { return ptr != nullptr; }
};

struct AttentionArgs {
    Dtype dtype = Dtype::float32;  // of q, k, v, out and their gradients
    Dtype bias_dtype = Dtype::float32;
    int64_t b = 0, h = 0, hk = 0, m = 0, n = 0, d = 0, dv = 0;
    int64_t sequences = 0;  // b, or the number of packed sequences

    double scale = 1;
    double softcap = 0;  // 0: none
    int64_t offset = 0, left = kUnlimited, right = kUnlimited;
    bool cached = false;  // the offset is key_lengths[b] - m, and nothing is read behind key_lengths[b]
    bool dropout = false;
    uint32_t dropout_threshold = 0;  // a weight is kept when its Philox word is at least this
    double keep_scale = 1;           // 1 / (1 - dropout_p)
    uint64_t seed = 0;

    TensorArg q, k, v, out;             // [b, h, m, d], [b, hk, n, d], [b, hk, n, dv], [b, h, m, dv]; last stride 1
    // Key j is row j % page of k and v [pages, hk, page, d] at page block_table[b][j / page]. Null where not paged.
    const int32_t* block_table = nullptr;  // [b, n / page] contiguous
    int64_t pages = 0, page = 0;
    TensorArg mask, bias;               // [1|b, 1|h, 1|m, 1|n]; a broadcast dimension has stride 0
    void* lse = nullptr;                // [b, h, m] contiguous, in the accumulator's dtype, as are the next two
    // What the backward knows weights by: the row's largest score, in the unit that tiles of scores have (cpu/score.h),
    // and the denominator of the softmax relative to its exponential; 0 for a row that sees no key.
    void *row_max = nullptr, *row_sum = nullptr;
    // [sequences + 1]: sequence t has rows [cu[t], cu[t + 1]) of q. Null where sequences are not packed.
    const int32_t* cu_seqlens_q = nullptr;
    const int32_t* cu_seqlens_k = nullptr;  // [sequences + 1], of k and v
    const int32_t* key_lengths = nullptr;  // [b]
    const int32_t* q_segments = nullptr;   // [b, m] contiguous
    const int32_t* k_segments = nullptr;   // [b, n] contiguous
    const float* alibi_slopes = nullptr;   // [sequences, h] contiguous
    const void* sinks = nullptr;           // [h], in the accumulator's dtype
    TensorArg exp_keys;                    // e^2k, of k's shape, in the accumulator's dtype; last stride 1
    int64_t e = 0, distances = 0, first = 0;  // of a relative term: its size, rows of relative_k, distance of the first
    TensorArg relative_q, relative_k;      // [b, h, m, e], [1|b, h, distances, e]; last stride 1
    const int32_t* q_ranks = nullptr;      // [b, m] contiguous
    const int32_t* k_ranks = nullptr;      // [b, n] contiguous
    const int32_t* row_first = nullptr;    // [b, m] contiguous
    const int32_t* row_stop = nullptr;     // [b, m] contiguous
    const void* weight = nullptr;          // [h, d] contiguous, in the accumulator's dtype; null for scores q.k

    // Backward only.
    TensorArg d_out, d_q, d_k, d_v;  // last stride 1
    TensorArg d_bias;                // in the bias's shape and dtype, where its gradient is wanted
    const void* d_lse = nullptr;     // [b, h, m] contiguous, in the accumulator's dtype
    void* delta = nullptr;           // [b, h, m] scratch, in the accumulator's dtype
    void* d_sinks = nullptr;         // [h], in the accumulator's dtype
    TensorArg d_relative_q, d_relative_k;  // in the shapes of relative_q and relative_k; last stride 1
    void* d_weight = nullptr;        // [h, d] contiguous, in the accumulator's dtype

    int threads = 1;

    // What block_table, cu_seqlens and key_lengths point to: the caller's own may change while the call runs, and these
    // numbers say what memory is read.
    std::vector<std::vector<int32_t>> integers;
};

}  // namespace pyattn
