// Which rows of the score matrix a block is, and what part of the other axis it meets.
#pragma once

#include "args.cuh"

struct Range {
    int first, last;  // [first, last)
};

// What decides, beside mask and segments, which keys a query sees.
struct Limits {
    int queries, keys;
    int offset, left, right;
};

// A block's place. Positions count inside its sequence, which is the batch entry where none are packed.
struct Place {
    int batch, head, sequence;
    int slice;               // of the columns of its results
    int first;               // row of its own axis
    int rows;                // of its own axis; those of keys include what lies behind key_lengths
    i64 q_start, k_start;    // where the sequence's rows begin in the tensors
    Limits limits;
};

DEVICE int blocks_of(int rows, int each) { return (rows + each - 1) / each; }

// Takes the place along one axis, of `size` places, off a number that counts all axes' places together.
DEVICE int take(int& number, int size) {
    const int place = number % size;
    number /= size;
    return place;
}

// Packed sequences have blocks of their own: a sequence from row `first` on owns the blocks from
// first / each + its number on, as many as it can need, wherever it begins, so that the host need not know its length.
DEVICE int find_sequence(const int* cu, int sequences, int block, int each) {
    int low = 0, high = sequences;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (cu[middle] / each + middle <= block ? low : high) = middle;
    }
    return low;
}

// [start, start + length) of a packed sequence. Wrong bounds must not read past the tensor.
DEVICE Range packed_rows(const int* cu, int sequence, int total) {
    const int first = min(max(cu[sequence], 0), total);
    return {first, max(min(cu[sequence + 1], total), first)};
}

enum Axis { QUERIES, KEYS };

// Finds the place of this block, which owns EACH rows of an axis. False where there is nothing to do.
// Blocks of queries come last first: under a causal mask the last has the most work.
template <Axis AXIS, int EACH> DEVICE bool locate(const Args& a, int slices, Place& p) {
    const int total = AXIS == QUERIES ? a.m : a.n, heads = AXIS == QUERIES ? a.h : a.hk;
    const int blocks = a.cu_q ? total / EACH + a.sequences : blocks_of(total, EACH);
    int rest = block_index();
    p.slice = take(rest, slices);
    int block = take(rest, blocks);
    p.head = take(rest, heads);
    p.batch = p.sequence = rest;
    p.q_start = p.k_start = 0;
    p.limits = {a.m, a.n, a.offset, a.left, a.right};
    if (a.cu_q) {
        const int* cu = AXIS == QUERIES ? a.cu_q : a.cu_k;
        p.sequence = find_sequence(cu, a.sequences, block, EACH);
        block -= cu[p.sequence] / EACH + p.sequence;
        const Range q = packed_rows(a.cu_q, p.sequence, a.m), k = packed_rows(a.cu_k, p.sequence, a.n);
        p.q_start = q.first;
        p.k_start = k.first;
        p.limits.queries = q.last - q.first;
        p.limits.keys = k.last - k.first;
        p.limits.offset = p.limits.keys - p.limits.queries;
    }
    p.rows = AXIS == QUERIES ? p.limits.queries : p.limits.keys;
    if (block < 0 || block >= blocks_of(p.rows, EACH)) return false;
    p.first = (AXIS == QUERIES ? blocks_of(p.rows, EACH) - 1 - block : block) * EACH;
    if (a.key_lengths) p.limits.keys = min(max(a.key_lengths[p.batch], 0), a.n);
    if (a.cached) p.limits.offset = p.limits.keys - a.m;
    return true;
}

// The keys that any query of [first, last) sees.
DEVICE Range keys_seen(const Limits& l, int first, int last) {
    return {max(first + l.offset - l.left, 0), min(last + l.offset + l.right, l.keys)};
}

// The queries that see any key of [first, last).
DEVICE Range queries_seeing(const Limits& l, int first, int last) {
    if (first >= last) return {0, 0};
    return {max(first - l.offset - l.right, 0), min(last - l.offset + l.left, l.queries)};
}

// Whether every query of [first_q, last_q) sees every key of [first_k, last_k).
DEVICE bool all_see_all(const Limits& l, int first_q, int last_q, int first_k, int last_k) {
    return last_q <= l.queries && last_k <= l.keys && first_k >= last_q - 1 + l.offset - l.left &&
           last_k - 1 <= first_q + l.offset + l.right;
}

// How many blocks of EACH rows cover a range; they begin at multiples of EACH.
template <int EACH> DEVICE int start_of(const Range& r) { return r.first / EACH * EACH; }
template <int EACH> DEVICE int steps_of(const Range& r) {
    return r.first < r.last ? blocks_of(r.last - start_of<EACH>(r), EACH) : 0;
}
