#include "plan.h"

#include <algorithm>

namespace pyattn {

namespace {

constexpr int64_t kEnoughPieces = 64, kFewestKeys = 512;
constexpr double kOperationsPerThread = 1 << 20;
constexpr double kAdditiveCost = 6;  // of a column of an additive score, in multiply-adds

int64_t tiles(int64_t length, int64_t size) { return (length + size - 1) / size; }

}  // namespace

Sequence sequence_of(const AttentionArgs& args, int64_t number) {
    if (args.cached) {
        const int64_t n = args.key_lengths[number];
        return {number, number, 0, args.m, 0, n, n - args.m};
    }
    if (!args.cu_seqlens_q) return {number, number, 0, args.m, 0, args.n, args.offset};
    const int64_t q = args.cu_seqlens_q[number], m = args.cu_seqlens_q[number + 1] - q;
    const int64_t k = args.cu_seqlens_k[number], n = args.cu_seqlens_k[number + 1] - k;
    return {number, 0, q, m, k, n, n - m};
}

bool grouped(const AttentionArgs& args, const Sequence& sequence) {
    return !args.relative_k && sequence.m * (args.h / args.hk) <= kQueries;
}

Pieces::Pieces(const AttentionArgs& args, Kind kind) : args_(args), kind_(kind), first_(1, 0) {
    first_.reserve(static_cast<size_t>(args.sequences) + 1);
    for (int64_t number = 0; number < args.sequences; ++number) {
        const Cut own = cut(number);
        first_.push_back(first_.back() + own.heads * own.tiles);
    }
}

Pieces::Cut Pieces::cut(int64_t number) const {
    const Sequence sequence = sequence_of(args_, number);
    const int64_t query_tiles_here = tiles(sequence.m, kQueries);
    switch (kind_) {
        case rows:
            if (grouped(args_, sequence)) return {args_.hk, query_tiles_here > 0};
            return {args_.h, query_tiles_here};
        case query_tiles: return {args_.h, query_tiles_here};
        case key_tiles: return {args_.hk, tiles(sequence.n, kKeys)};
        case kv_heads: break;
    }
    return {args_.hk, 1};
}

Piece Pieces::piece(int64_t number) const {
    const auto next = std::upper_bound(first_.begin(), first_.end(), number);
    const int64_t sequence = next - first_.begin() - 1, inside = number - first_[static_cast<size_t>(sequence)];
    const int64_t count = cut(sequence).tiles;
    return {sequence, inside / count, inside % count, count};
}

int64_t longest_keys(const AttentionArgs& args) {
    int64_t longest = 0;
    for (int64_t number = 0; number < args.sequences; ++number) {
        longest = std::max(longest, sequence_of(args, number).n);
    }
    return longest;
}

Chunks chunks_of(const AttentionArgs& args, int64_t pieces) {
    const int64_t longest = longest_keys(args);
    if (pieces == 0 || pieces >= kEnoughPieces || longest < 2 * kFewestKeys) return {1, longest};
    const int64_t wanted = std::min(tiles(kEnoughPieces, pieces), longest / kFewestKeys);
    const int64_t keys = tiles(tiles(longest, wanted), kKeys) * kKeys;
    return {tiles(longest, keys), keys};
}

int threads_worth(const AttentionArgs& args) {
    double pairs = 0;
    for (int64_t number = 0; number < args.sequences; ++number) {
        const Sequence sequence = sequence_of(args, number);
        pairs += static_cast<double>(sequence.m) * static_cast<double>(sequence.n);
    }
    const double per_column = args.weight ? kAdditiveCost : 1;
    const double columns = per_column * static_cast<double>(args.d) + static_cast<double>(2 * args.e + args.dv);
    const double operations = 2 * pairs * static_cast<double>(args.h) * columns;
    return static_cast<int>(std::min<double>(args.threads, 1 + operations / kOperationsPerThread));
}

}  // namespace pyattn
