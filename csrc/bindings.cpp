// pyattn._C: Python's arguments to the kernels'. Everything that a kernel relies on is checked here again, whatever
// Python has checked: sizes, strides, that no tensor reaches beyond its storage, and the values that place rows.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "attention_args.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

using pyattn::AttentionArgs;
using pyattn::Dtype;
using pyattn::Isa;
using pyattn::TensorArg;

// The message is built only when it is needed.
#define REQUIRE(holds, message)                     \
    do {                                            \
        if (!(holds)) throw py::value_error(message); \
    } while (false)

Dtype dtype_of(const std::string& name) {
    if (name == "float32") return Dtype::float32;
    if (name == "bfloat16") return Dtype::bfloat16;
    if (name == "float16") return Dtype::float16;
    if (name == "float64") return Dtype::float64;
    throw py::value_error("dtype: expected float32, bfloat16, float16 or float64, got " + name);
}

int64_t size_of(Dtype dtype) {
    if (dtype == Dtype::float64) return 8;
    return dtype == Dtype::float32 ? 4 : 2;
}

const Isa& isa_of(const std::string& name) {
    for (const Isa* isa = pyattn::kIsas; isa->name; ++isa) {
        if (name == isa->name && isa->usable()) return *isa;
    }
    throw py::value_error("isa: " + name + " is not usable here");
}

// a * b + c in 64 bits, or an error.
int64_t checked(int64_t a, int64_t b, int64_t c, const std::string& name) {
    int64_t product = 0, sum = 0;
    const bool overflows = __builtin_mul_overflow(a, b, &product) || __builtin_add_overflow(product, c, &sum);
    REQUIRE(!overflows, name + ": sizes and strides overflow 63 bits");
    return sum;
}

// What a kernel expects of a tensor.
struct Form {
    int rank;
    int64_t size[4];
    int64_t element;   // bytes
    bool broadcasts;   // sizes may be 1 instead, any strides
    bool contiguous;   // read as one piece; otherwise the last stride alone must be 1
};

// Every element lies in the storage [base, base + bytes).
void check_bounds(const std::string& name, const TensorArg& tensor, int64_t element, uintptr_t base, int64_t bytes) {
    int64_t lowest = 0, highest = 0, count = 1;
    for (int axis = 0; axis < 4; ++axis) {
        count = checked(count, tensor.size[axis], 0, name);
        const int64_t last = tensor.size[axis] - 1;
        int64_t& end = tensor.stride[axis] < 0 ? lowest : highest;
        end = checked(last, tensor.stride[axis], end, name);
    }
    checked(count, element, 0, name);
    if (count == 0) return;
    const int64_t at = static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor.ptr) - base);
    const bool inside = tensor.ptr && at >= 0 && checked(lowest, element, at, name) >= 0 &&
                        checked(highest, element, checked(1, element, at, name), name) <= bytes;
    REQUIRE(inside, name + ": reaches outside its storage of " + std::to_string(bytes) + " bytes");
}

// given: (pointer, shape, strides, storage's pointer, storage's bytes). Broadcasting dimensions get stride 0.
TensorArg tensor(const std::string& name, const py::tuple& given, const Form& form) {
    REQUIRE(given.size() == 5, name + ": expected (pointer, shape, strides, storage pointer, storage bytes)");
    const py::tuple size = given[1], stride = given[2];
    const auto rank = static_cast<size_t>(form.rank);
    REQUIRE(size.size() == rank && stride.size() == rank, name + ": expected " + std::to_string(rank) + " dimensions");
    TensorArg tensor;
    tensor.ptr = reinterpret_cast<void*>(given[0].cast<uintptr_t>());
    int64_t next = 1;  // the stride that a contiguous tensor would have
    bool empty = false;
    for (size_t place = 0; place < rank; ++place) empty |= size[place].cast<int64_t>() == 0;
    for (int axis = form.rank - 1; axis >= 0; --axis) {
        const auto place = static_cast<size_t>(axis);
        const int64_t expected = form.size[axis], got = size[place].cast<int64_t>();
        REQUIRE(got >= 0, name + ": expected sizes of at least 0, got " + std::to_string(got));
        REQUIRE(got == expected || (form.broadcasts && got == 1),
                name + ": expected size " + std::to_string(expected) + " in dimension " + std::to_string(axis) +
                    ", got " + std::to_string(got));
        tensor.size[axis] = got;
        tensor.stride[axis] = got == 1 ? 0 : stride[place].cast<int64_t>();
        // A tensor without elements is contiguous, whatever its strides.
        REQUIRE(!form.contiguous || got <= 1 || empty || tensor.stride[axis] == next,
                name + ": expected a contiguous tensor");
        next = checked(next, got, 0, name);
    }
    const int last = form.rank - 1;
    REQUIRE(form.broadcasts || form.contiguous || tensor.size[last] <= 1 || tensor.stride[last] == 1,
            name + ": last stride must be 1");
    check_bounds(name, tensor, form.element, given[3].cast<uintptr_t>(), given[4].cast<int64_t>());
    REQUIRE(reinterpret_cast<uintptr_t>(tensor.ptr) % static_cast<uintptr_t>(form.element) == 0,
            name + ": expected elements aligned to their " + std::to_string(form.element) + " bytes");
    static char nothing;
    if (!tensor.ptr) tensor.ptr = &nothing;  // empty, so never read; but present
    return tensor;
}

int64_t number(const py::handle& given) { return given.cast<int64_t>(); }

// sizes: (b, h, hk, m, n, d, dv, sequences)
void fill_sizes(AttentionArgs& args, const py::tuple& sizes) {
    REQUIRE(sizes.size() == 8, "sizes: expected (b, h, hk, m, n, d, dv, sequences)");
    int64_t* const fields[] = {&args.b, &args.h, &args.hk, &args.m, &args.n, &args.d, &args.dv, &args.sequences};
    for (size_t place = 0; place < 8; ++place) {
        *fields[place] = number(sizes[place]);
        REQUIRE(*fields[place] >= 0 && *fields[place] < pyattn::kUnlimited / 4, "sizes: out of range");
    }
    REQUIRE(args.hk > 0 && args.h > 0 && args.h % args.hk == 0, "sizes: h must be a positive multiple of hk");
    for (const auto& [name, size] : {std::pair{"d", args.d}, std::pair{"dv", args.dv}}) {
        REQUIRE(size >= 1 && size <= pyattn::kMaxHeadDim, std::string(name) + ": expected 1 to " +
                    std::to_string(pyattn::kMaxHeadDim) + ", got " + std::to_string(size));
    }
}

// relative: (first, distances, e) of a relative term, or None
void fill_relative(AttentionArgs& args, const py::object& given) {
    if (given.is_none()) return;
    const auto relative = given.cast<py::tuple>();
    REQUIRE(relative.size() == 3, "relative: expected (first, distances, e)");
    args.first = number(relative[0]);
    args.distances = number(relative[1]);
    args.e = number(relative[2]);
    REQUIRE(args.first > -pyattn::kUnlimited && args.first < pyattn::kUnlimited, "first: out of range");
    REQUIRE(args.distances >= 0 && args.distances < pyattn::kUnlimited / 4, "distances: out of range");
    REQUIRE(args.e >= 1 && args.e <= pyattn::kMaxHeadDim, "e: expected 1 to " + std::to_string(pyattn::kMaxHeadDim) +
                                                              ", got " + std::to_string(args.e));
}

// numbers: (scale, offset, left, right, softcap, dropout_p, seed), None where pyattn/spec.py has None.
void fill_numbers(AttentionArgs& args, const py::tuple& numbers) {
    REQUIRE(numbers.size() == 7, "numbers: expected (scale, offset, left, right, softcap, dropout_p, seed)");
    const auto side = [](const py::handle& given) {
        if (given.is_none()) return pyattn::kUnlimited;
        return std::min(std::max(number(given), -pyattn::kUnlimited), pyattn::kUnlimited);
    };
    args.scale = numbers[0].cast<double>();
    args.cached = numbers[1].is_none();
    args.offset = args.cached ? 0 : number(numbers[1]);
    args.left = side(numbers[2]);
    args.right = side(numbers[3]);
    args.softcap = numbers[4].is_none() ? 0 : numbers[4].cast<double>();
    const auto dropout_p = numbers[5].cast<double>();
    args.seed = numbers[6].is_none() ? 0 : static_cast<uint64_t>(number(numbers[6]));
    REQUIRE(args.offset > -pyattn::kUnlimited && args.offset < pyattn::kUnlimited, "offset: out of range");
    REQUIRE(dropout_p >= 0 && dropout_p < 1, "dropout_p: expected [0, 1), got " + std::to_string(dropout_p));
    args.dropout = dropout_p > 0;
    args.dropout_threshold = static_cast<uint32_t>(dropout_p * 0x1p32);
    args.keep_scale = 1 / (1 - dropout_p);
}

template <class Element>
void point(Element*& field, const TensorArg& tensor) {
    field = static_cast<Element*>(tensor.ptr);
}

// A copy of a contiguous tensor's numbers, which the caller cannot change any more.
void copy(AttentionArgs& args, const int32_t*& field, const TensorArg& tensor) {
    const auto* const numbers = static_cast<const int32_t*>(tensor.ptr);
    std::vector<int32_t>& copied = args.integers.emplace_back(numbers, numbers + tensor.size[0] * tensor.size[1]);
    copied.push_back(0);  // so that an empty tensor, too, has an address: a null pointer is an absent one
    field = copied.data();
}

// The first and third size of k and v: [b, hk, n, *], or [pages, hk, page, *] where there is a block table.
std::pair<int64_t, int64_t> cache_sizes(AttentionArgs& args, const py::dict& tensors) {
    if (!tensors.contains("block_table")) return {args.b, args.n};
    REQUIRE(tensors.contains("k"), "block_table: there is no k");
    const py::tuple given = tensors["k"], size = given[1];
    REQUIRE(size.size() == 4, "k: expected 4 dimensions");
    args.pages = number(size[0]);
    args.page = number(size[2]);
    REQUIRE(args.page > 0 && args.n % args.page == 0, "block_table: n is not a multiple of the page size");
    return {args.pages, args.page};
}

// tensors: {name: (pointer, shape, strides, storage's pointer, storage's bytes)}, those that the call has.
void fill_tensors(AttentionArgs& args, const py::dict& tensors) {
    const int64_t item = size_of(args.dtype), sum = args.dtype == Dtype::float64 ? 8 : 4;
    const int64_t bias = size_of(args.bias_dtype), ends = args.sequences + 1;
    const auto [entries, rows] = cache_sizes(args, tensors);
    const Form q{4, {args.b, args.h, args.m, args.d}, item, false, false};
    const Form k{4, {entries, args.hk, rows, args.d}, item, false, false};
    const Form v{4, {entries, args.hk, rows, args.dv}, item, false, false};
    const Form out{4, {args.b, args.h, args.m, args.dv}, item, false, false};
    const Form exp_keys{4, {entries, args.hk, rows, args.d}, sum, false, false};
    const Form weight{2, {args.h, args.d, 1, 1}, sum, false, true};
    const auto distances = [&](const std::string& name, const py::tuple& tensor) {
        const py::tuple size = tensor[1];
        REQUIRE(size.size() == 4, name + ": expected 4 dimensions");
        const int64_t entries = number(size[0]) == 1 ? 1 : args.b;
        return Form{4, {entries, args.h, args.distances, args.e}, item, false, false};
    };
    const Form relative_q{4, {args.b, args.h, args.m, args.e}, item, false, false};
    const Form row{3, {args.b, args.h, args.m, 1}, sum, false, true};
    const auto score = [&](int64_t element) {
        return Form{4, {args.b, args.h, args.m, args.n}, element, true, false};
    };
    const auto list = [](int64_t length, int64_t element) { return Form{1, {length, 1, 1, 1}, element, false, true}; };
    const auto table = [](int64_t rows, int64_t columns) { return Form{2, {rows, columns, 1, 1}, 4, false, true}; };
    for (const auto& [key, value] : tensors) {
        const auto name = key.cast<std::string>();
        const auto given = [&, &value = value](const Form& form) {
            return tensor(name, value.cast<py::tuple>(), form);
        };
        if (name == "q") args.q = given(q);
        else if (name == "k") args.k = given(k);
        else if (name == "v") args.v = given(v);
        else if (name == "out") args.out = given(out);
        else if (name == "lse") point(args.lse, given(row));
        else if (name == "row_max") point(args.row_max, given(row));
        else if (name == "row_sum") point(args.row_sum, given(row));
        else if (name == "mask") args.mask = given(score(1));
        else if (name == "bias") args.bias = given(score(bias));
        else if (name == "key_lengths") copy(args, args.key_lengths, given(list(args.b, 4)));
        else if (name == "block_table") copy(args, args.block_table, given(table(args.b, args.n / args.page)));
        else if (name == "q_segments") point(args.q_segments, given(table(args.b, args.m)));
        else if (name == "k_segments") point(args.k_segments, given(table(args.b, args.n)));
        else if (name == "cu_seqlens_q") copy(args, args.cu_seqlens_q, given(list(ends, 4)));
        else if (name == "cu_seqlens_k") copy(args, args.cu_seqlens_k, given(list(ends, 4)));
        else if (name == "alibi_slopes") point(args.alibi_slopes, given(table(args.sequences, args.h)));
        else if (name == "sinks") point(args.sinks, given(list(args.h, sum)));
        else if (name == "exp_keys") args.exp_keys = given(exp_keys);
        else if (name == "weight") point(args.weight, given(weight));
        else if (name == "relative_q") args.relative_q = given(relative_q);
        else if (name == "relative_k") args.relative_k = given(distances(name, value.cast<py::tuple>()));
        else if (name == "d_relative_q") args.d_relative_q = given(relative_q);
        else if (name == "d_relative_k") args.d_relative_k = given(distances(name, value.cast<py::tuple>()));
        else if (name == "q_ranks") point(args.q_ranks, given(table(args.b, args.m)));
        else if (name == "k_ranks") point(args.k_ranks, given(table(args.b, args.n)));
        else if (name == "row_first") point(args.row_first, given(table(args.b, args.m)));
        else if (name == "row_stop") point(args.row_stop, given(table(args.b, args.m)));
        else if (name == "d_weight") point(args.d_weight, given(weight));
        else if (name == "d_out") args.d_out = given(out);
        else if (name == "d_q") args.d_q = given(q);
        else if (name == "d_k") args.d_k = given(k);
        else if (name == "d_v") args.d_v = given(v);
        else if (name == "d_bias") args.d_bias = given(score(bias));
        else if (name == "d_lse") point(args.d_lse, given(row));
        else if (name == "delta") point(args.delta, given(row));
        else if (name == "d_sinks") point(args.d_sinks, given(list(args.h, sum)));
        else throw py::value_error(name + ": no such tensor");
    }
}

void check_ends(const std::string& name, const int32_t* ends, int64_t sequences, int64_t total) {
    REQUIRE(ends[0] == 0, name + ": expected to begin with 0, got " + std::to_string(ends[0]));
    for (int64_t t = 0; t < sequences; ++t) {
        REQUIRE(ends[t + 1] >= ends[t], name + ": decreases after entry " + std::to_string(t));
    }
    REQUIRE(ends[sequences] <= total, name + ": ends at " + std::to_string(ends[sequences]) +
                                          ", beyond the " + std::to_string(total) + " rows");
}

void check_values(const AttentionArgs& args) {
    REQUIRE(!args.cu_seqlens_q == !args.cu_seqlens_k, "cu_seqlens_q, cu_seqlens_k: expected both or neither");
    REQUIRE(args.cu_seqlens_q ? args.b == 1 : args.sequences == args.b, "sequences: not the batch size");
    REQUIRE(!args.cu_seqlens_q || !(args.mask || args.bias || args.key_lengths || args.q_segments || args.q_ranks ||
                                    args.row_first),
            "cu_seqlens_q: excludes mask, bias, key_lengths, segments, ranks and row windows");
    REQUIRE(!args.cached || (args.key_lengths && !args.cu_seqlens_q), "offset: expected a number, without key_lengths");
    REQUIRE(!args.block_table || args.cached, "block_table: expected no offset");
    REQUIRE(!args.q_segments == !args.k_segments, "q_segments, k_segments: expected both or neither");
    REQUIRE(!args.q_ranks == !args.k_ranks, "q_ranks, k_ranks: expected both or neither");
    REQUIRE(!args.row_first == !args.row_stop, "row_first, row_stop: expected both or neither");
    REQUIRE(!args.relative_q == !args.relative_k, "relative_q, relative_k: expected both or neither");
    REQUIRE(!args.relative_k || !(args.cu_seqlens_q || args.cached || args.weight),
            "relative_k: excludes packed sequences, caches and additive scores");
    if (args.relative_k && args.m > 0 && args.n > 0) {
        const int64_t lowest = std::max(args.offset - args.n + 1, -args.right);
        const int64_t highest = std::min(args.offset + args.m - 1, args.left);
        REQUIRE(lowest > highest || (args.first <= lowest && highest < args.first + args.distances),
                "relative_k: expected rows for the distances " + std::to_string(lowest) + " to " +
                    std::to_string(highest) + ", got " + std::to_string(args.distances) + " from " +
                    std::to_string(args.first) + " on");
    }
    if (args.cu_seqlens_q) {
        check_ends("cu_seqlens_q", args.cu_seqlens_q, args.sequences, args.m);
        check_ends("cu_seqlens_k", args.cu_seqlens_k, args.sequences, args.n);
    }
    for (int64_t batch = 0; args.key_lengths && batch < args.b; ++batch) {
        const int32_t length = args.key_lengths[batch];
        REQUIRE(length >= 0 && length <= args.n, "key_lengths: expected 0 to n, got " + std::to_string(length));
        for (int64_t j = 0; args.block_table && j < length; j += args.page) {
            const int32_t page = args.block_table[(batch * args.n + j) / args.page];
            REQUIRE(page >= 0 && page < args.pages, "block_table: expected 0 to " + std::to_string(args.pages - 1) +
                                                        ", got " + std::to_string(page));
        }
    }
}

AttentionArgs arguments(const std::string& dtype, const std::string& bias_dtype, const py::tuple& sizes,
                        const py::tuple& numbers, const py::object& relative, const py::dict& tensors, int threads) {
    AttentionArgs args;
    args.dtype = dtype_of(dtype);
    args.bias_dtype = dtype_of(bias_dtype);
    REQUIRE(threads >= 1, "threads: expected at least 1, got " + std::to_string(threads));
    args.threads = threads;
    fill_sizes(args, sizes);
    fill_numbers(args, numbers);
    fill_relative(args, relative);
    fill_tensors(args, tensors);
    check_values(args);
    REQUIRE(args.q && args.k && args.v && args.out && args.lse && args.row_max && args.row_sum,
            "q, k, v, out, lse, row_max, row_sum: expected all of them");
    return args;
}

py::list isas() {
    py::list names;
    for (const Isa* isa = pyattn::kIsas; isa->name; ++isa) {
        if (isa->usable()) names.append(isa->name);
    }
    return names;
}

void forward(const std::string& isa, const std::string& dtype, const std::string& bias_dtype, const py::tuple& sizes,
             const py::tuple& numbers, const py::object& relative, const py::dict& tensors, int threads) {
    const AttentionArgs args = arguments(dtype, bias_dtype, sizes, numbers, relative, tensors, threads);
    const Isa& chosen = isa_of(isa);
    const py::gil_scoped_release release;
    chosen.forward(args);
}

void backward(const std::string& isa, const std::string& dtype, const std::string& bias_dtype, const py::tuple& sizes,
              const py::tuple& numbers, const py::object& relative, const py::dict& tensors, int threads) {
    const AttentionArgs args = arguments(dtype, bias_dtype, sizes, numbers, relative, tensors, threads);
    REQUIRE(!args.block_table, "block_table: pages have no gradient");
    REQUIRE(args.d_out && args.d_q && args.d_k && args.d_v && args.delta, "d_out, d_q, d_k, d_v, delta: expected all");
    REQUIRE(!args.d_bias || args.bias, "d_bias: there is no bias");
    REQUIRE(!args.d_sinks == !args.sinks, "d_sinks: expected with sinks, and only with them");
    REQUIRE(!args.d_weight == !args.weight, "d_weight: expected with weight, and only with it");
    REQUIRE(!args.d_relative_q == !args.relative_q && !args.d_relative_k == !args.relative_k,
            "d_relative_q, d_relative_k: expected with relative_q and relative_k, and only with them");
    REQUIRE(!args.relative_k || args.d_relative_k.size[0] == args.relative_k.size[0],
            "d_relative_k: expected the sizes of relative_k");
    for (int axis = 0; args.d_bias && axis < 4; ++axis) {
        REQUIRE(args.d_bias.size[axis] == args.bias.size[axis], "d_bias: expected the sizes of bias");
    }
    const Isa& chosen = isa_of(isa);
    const py::gil_scoped_release release;
    chosen.backward(args);
}

// y [rows, out] = x [rows, in] w [out, in]^T + bias [out], which may be None.
void linear(const std::string& isa, const std::string& dtype, const py::tuple& x, const py::tuple& w,
            const py::object& bias, const py::tuple& y, int threads) {
    pyattn::LinearArgs args;
    args.dtype = dtype_of(dtype);
    REQUIRE(threads >= 1, "threads: expected at least 1, got " + std::to_string(threads));
    args.threads = threads;
    const py::tuple x_size = x[1], w_size = w[1];
    REQUIRE(x_size.size() == 2 && w_size.size() == 2, "x, w: expected 2 dimensions");
    args.rows = number(x_size[0]);
    args.in = number(x_size[1]);
    args.out = number(w_size[0]);
    const int64_t item = size_of(args.dtype);
    checked(checked(args.rows, checked(args.in, 1, 64, "x"), 0, "x"), 8, 0, "x");  // what converted rows take
    args.x = tensor("x", x, {2, {args.rows, args.in, 1, 1}, item, false, false});
    args.w = tensor("w", w, {2, {args.out, args.in, 1, 1}, item, false, false});
    args.y = tensor("y", y, {2, {args.rows, args.out, 1, 1}, item, false, false});
    if (!bias.is_none()) args.bias = tensor("bias", bias.cast<py::tuple>(), {1, {args.out, 1, 1, 1}, item, false, true});
    const Isa& chosen = isa_of(isa);
    const py::gil_scoped_release release;
    chosen.linear(args);
}

double multiply_add_rate(const std::string& isa, const std::string& dtype, int threads) {
    const Isa& chosen = isa_of(isa);
    const Dtype of = dtype_of(dtype);
    REQUIRE(threads >= 1, "threads: expected at least 1, got " + std::to_string(threads));
    const py::gil_scoped_release release;
    return pyattn::multiply_add_rate(chosen, of, threads);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "pyattn's compiled kernels. Import torch first, so that both share one OpenMP runtime.";
    module.def("isas", &isas, "Instruction sets usable on this machine, best first.");
    module.def("forward", &forward, "Writes out, lse, row_max and row_sum.");
    module.def("backward", &backward, "Writes the gradients; `delta` is scratch.");
    module.def("linear", &linear, "Writes y = x w^T + bias, for few rows of x.");
    module.def("multiply_add_rate", &multiply_add_rate, "Operations per second of a loop of multiply-adds.");
}
