// How a call is cut into pieces of work. Compiled once, without instruction-set flags.
#pragma once

#include <vector>

#include "../attention_args.h"

namespace pyattn {

constexpr int kQueries = 64;  // queries per tile; the lanes of a score tile
constexpr int kKeys = 64;     // keys per tile; a multiple of 4, so that one Philox call never spans two tiles

// One attention problem of the batch. Rows q_begin... and k_begin... of batch element `entry` of the tensors are its.
struct Sequence {
    int64_t number, entry, q_begin, m, k_begin, n, offset;
};
Sequence sequence_of(const AttentionArgs& args, int64_t number);

// All the queries of a group of heads fit into one tile. Their keys and values are then read once. Not of a relative
// term, whose rows each head has of its own.
bool grouped(const AttentionArgs& args, const Sequence& sequence);

struct Piece {
    int64_t sequence, head, tile, tiles;
};

// Every tile of every head of every sequence, numbered.
class Pieces {
  public:
    enum Kind {
        rows,         // tiles of queries; where a group's queries fit into one, `head` is the key/value head
        query_tiles,  // tiles of queries
        key_tiles,    // tiles of keys of a key/value head
        kv_heads      // whole key/value heads
    };
    Pieces(const AttentionArgs& args, Kind kind);
    int64_t count() const { return first_.back(); }
    Piece piece(int64_t number) const;

  private:
    struct Cut {
        int64_t heads, tiles;
    };
    Cut cut(int64_t sequence) const;

    const AttentionArgs& args_;
    Kind kind_;
    std::vector<int64_t> first_;  // the number of the first piece of every sequence, and of the one after the last
};

// The keys of a call in chunks that different threads take, for calls with too few pieces to keep them busy. The cut
// depends on the shapes alone, so that the result does not depend on the number of threads.
struct Chunks {
    int64_t count, keys;
};
Chunks chunks_of(const AttentionArgs& args, int64_t pieces);

int64_t longest_keys(const AttentionArgs& args);

// Threads worth starting: waking one takes as long as about a million operations.
int threads_worth(const AttentionArgs& args);

}  // namespace pyattn
