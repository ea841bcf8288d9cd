// Rows of a matrix in global memory, and the parts of shared memory that they are copied to.
#pragma once

#include "patch.cuh"

// Hands out shared memory from its start on; cuda_config.py knows how much a kernel takes.
class Arena {
   public:
    template <class X> DEVICE X* take(int count) {
        X* at = reinterpret_cast<X*>(next);
        next += count * sizeof(X);
        return at;
    }

   private:
    u8* next = shared_memory();
};

// Rows that lie a stride apart; or, where `each` is not 0, that many in each of several pages, which a table finds or
// which lie a stride apart, too. Rows outside [first, last) are zeros and never read.
template <class T> struct Rows {
    const T* at;
    i64 stride;
    int first, last;
    int columns;
    bool aligned;  // to 16 bytes: every row, and their length
    int each = 0, pages = 0;
    i64 page_stride = 0;
    const int* table = nullptr;

    DEVICE const T* row(int i) const {
        if (each == 0) return at + i * stride;
        int page = i / each;
        if (table) page = min(max(table[page], 0), pages - 1);  // a wrong page must not be read
        return at + page * page_stride + i % each * stride;
    }
    DEVICE bool has(int i, int column) const { return i >= first && i < last && column < columns; }
};

// The rows `range` of one head's matrix, counted from row `start` of it on.
template <class T>
DEVICE Rows<T> rows_of(const Args& a, const Matrix& x, int batch, int head, i64 start, Range range, int columns) {
    const T* at = static_cast<const T*>(x.at) + batch * x.batch + head * x.head + start * x.row;
    return {at, x.row, range.first, range.last, columns, a.aligned != 0};
}

// The same of a cache, which may be paged.
template <class T>
DEVICE Rows<T> cache_rows_of(const Args& a, const Matrix& x, int batch, int head, Range range, int columns) {
    Rows<T> rows = rows_of<T>(a, x, a.block_table ? 0 : batch, head, 0, range, columns);
    if (a.block_table) {
        rows.each = a.page;
        rows.pages = a.pages;
        rows.page_stride = x.batch;
        rows.table = a.block_table + static_cast<i64>(batch) * (a.n / a.page);
    }
    return rows;
}

// The query heads of a group as rows of one matrix, query after query.
template <class T>
DEVICE Rows<T> group_rows_of(const Args& a, const Matrix& x, int batch, int first_head, int group, int columns) {
    Rows<T> rows = rows_of<T>(a, x, batch, first_head, 0, {0, group * a.m}, columns);
    rows.stride = x.head;
    rows.each = group;
    rows.page_stride = x.row;
    return rows;
}

// Writes a warp's rows of results [16, 8 * TILES], times a factor for each of a lane's two rows, to a matrix's columns
// from `first_column` on.
template <class T, class Acc, int TILES>
DEVICE void store_rows(const Matrix& x, int batch, int head, i64 start, const int (&row)[2], const bool (&wanted)[2],
                       const Acc (&results)[TILES][4], const Acc (&factor)[2], int first_column, int columns) {
    T* at = static_cast<T*>(x.at) + batch * x.batch + head * x.head + start * x.row;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (!wanted[r]) continue;
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
            for (int c = 0; c < 2; ++c) {
                const int column = first_column + 8 * j + lane_index() % 4 * 2 + c;
                if (column < columns) round_to(at[row[r] * x.row + column], results[j][2 * r + c] * factor[r]);
            }
        }
    }
}
