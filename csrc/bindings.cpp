// pyattn._C: keyword arguments to AttentionArgs, checked for range, run without the GIL.
// User input is validated in pyattn/check.py; a ValueError from here is a bug in the Python side, not in a user's call.
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

#include "attention_args.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

using pyattn::AttentionArgs;
using pyattn::Dtype;
using pyattn::Isa;
using pyattn::TensorArg;

void require(bool holds, const std::string& message) {
    if (!holds) throw py::value_error(message);
}

template <class Value>
Value required(const py::kwargs& kwargs, const char* name) {
    require(kwargs.contains(name), std::string(name) + ": missing");
    return kwargs[name].cast<Value>();
}

template <class Value>
Value optional(const py::kwargs& kwargs, const char* name, Value otherwise) {
    if (!kwargs.contains(name) || kwargs[name].is_none()) return otherwise;
    return kwargs[name].cast<Value>();
}

template <class Element>
Element* pointer(const py::kwargs& kwargs, const char* name) {
    return reinterpret_cast<Element*>(optional<uintptr_t>(kwargs, name, 0));
}

Dtype dtype_of(const std::string& name) {
    if (name == "float32") return Dtype::float32;
    if (name == "bfloat16") return Dtype::bfloat16;
    if (name == "float16") return Dtype::float16;
    if (name == "float64") return Dtype::float64;
    throw py::value_error("dtype: expected float32, bfloat16, float16 or float64, got " + name);
}

const Isa& isa_of(const std::string& name) {
    for (const Isa* isa = pyattn::kIsas; isa->name; ++isa) {
        if (name == isa->name && isa->usable()) return *isa;
    }
    throw py::value_error("isa: " + name + " is not usable here");
}

struct Shape {
    int64_t size[4];
};

// (pointer, shape, strides) of a four-dimensional tensor. Broadcasting dimensions get stride 0.
TensorArg tensor(const py::kwargs& kwargs, const char* name, const Shape& expected, bool broadcasts) {
    if (!kwargs.contains(name) || kwargs[name].is_none()) return {};
    const py::tuple given = kwargs[name];
    require(given.size() == 3, std::string(name) + ": expected (pointer, shape, strides)");
    const py::tuple size = given[1], stride = given[2];
    require(size.size() == 4 && stride.size() == 4, std::string(name) + ": expected 4 dimensions");
    TensorArg tensor;
    tensor.ptr = reinterpret_cast<void*>(given[0].cast<uintptr_t>());
    for (int axis = 0; axis < 4; ++axis) {
        tensor.size[axis] = size[axis].cast<int64_t>();
        const bool fits = tensor.size[axis] == expected.size[axis] || (broadcasts && tensor.size[axis] == 1);
        require(fits, std::string(name) + ": expected size " + std::to_string(expected.size[axis]) + " in dimension " +
                          std::to_string(axis) + ", got " + std::to_string(tensor.size[axis]));
        tensor.stride[axis] = tensor.size[axis] == 1 ? 0 : stride[axis].cast<int64_t>();
    }
    require(broadcasts || tensor.size[3] <= 1 || tensor.stride[3] == 1, std::string(name) + ": last stride must be 1");
    return tensor;
}

void fill_sizes(AttentionArgs& args, const py::kwargs& kwargs) {
    const auto sizes = required<py::tuple>(kwargs, "sizes");
    require(sizes.size() == 7, "sizes: expected (b, h, hk, m, n, d, dv)");
    int64_t* const fields[] = {&args.b, &args.h, &args.hk, &args.m, &args.n, &args.d, &args.dv};
    for (size_t place = 0; place < 7; ++place) {
        *fields[place] = sizes[place].cast<int64_t>();
        require(*fields[place] >= 0 && *fields[place] < pyattn::kUnlimited / 4, "sizes: out of range");
    }
    require(args.hk > 0 && args.h > 0 && args.h % args.hk == 0, "sizes: h must be a positive multiple of hk");
    require(args.d >= 1 && args.d <= pyattn::kMaxHeadDim, "d: expected 1 to 512, got " + std::to_string(args.d));
    require(args.dv >= 1 && args.dv <= pyattn::kMaxHeadDim, "dv: expected 1 to 512, got " + std::to_string(args.dv));
}

void fill_score(AttentionArgs& args, const py::kwargs& kwargs) {
    const auto band = [](int64_t side) { return std::min(std::max(side, -pyattn::kUnlimited), pyattn::kUnlimited); };
    args.scale = required<double>(kwargs, "scale");
    args.softcap = optional<double>(kwargs, "softcap", 0);
    args.offset = required<int64_t>(kwargs, "offset");
    args.left = band(optional<int64_t>(kwargs, "left", pyattn::kUnlimited));
    args.right = band(optional<int64_t>(kwargs, "right", pyattn::kUnlimited));
    require(args.offset > -pyattn::kUnlimited && args.offset < pyattn::kUnlimited, "offset: out of range");
    const auto dropout_p = optional<double>(kwargs, "dropout_p", 0);
    require(dropout_p >= 0 && dropout_p < 1, "dropout_p: expected [0, 1), got " + std::to_string(dropout_p));
    args.dropout = dropout_p > 0;
    args.dropout_threshold = static_cast<uint32_t>(dropout_p * 0x1p32);
    args.keep_scale = 1 / (1 - dropout_p);
    args.seed = static_cast<uint64_t>(optional<int64_t>(kwargs, "seed", 0));
}

AttentionArgs arguments(const py::kwargs& kwargs) {
    AttentionArgs args;
    fill_sizes(args, kwargs);
    fill_score(args, kwargs);
    args.dtype = dtype_of(required<std::string>(kwargs, "dtype"));
    args.bias_dtype = dtype_of(optional<std::string>(kwargs, "bias_dtype", "float32"));
    args.threads = required<int>(kwargs, "threads");
    require(args.threads >= 1, "threads: expected at least 1, got " + std::to_string(args.threads));
    const Shape q{{args.b, args.h, args.m, args.d}}, k{{args.b, args.hk, args.n, args.d}};
    const Shape v{{args.b, args.hk, args.n, args.dv}}, out{{args.b, args.h, args.m, args.dv}};
    const Shape score{{args.b, args.h, args.m, args.n}};
    args.q = tensor(kwargs, "q", q, false);
    args.k = tensor(kwargs, "k", k, false);
    args.v = tensor(kwargs, "v", v, false);
    args.out = tensor(kwargs, "out", out, false);
    args.mask = tensor(kwargs, "mask", score, true);
    args.bias = tensor(kwargs, "bias", score, true);
    args.d_out = tensor(kwargs, "d_out", out, false);
    args.d_q = tensor(kwargs, "d_q", q, false);
    args.d_k = tensor(kwargs, "d_k", k, false);
    args.d_v = tensor(kwargs, "d_v", v, false);
    args.d_bias = tensor(kwargs, "d_bias", score, true);
    args.lse = pointer<void>(kwargs, "lse");
    args.d_lse = pointer<const void>(kwargs, "d_lse");
    args.delta = pointer<void>(kwargs, "delta");
    args.sinks = pointer<const void>(kwargs, "sinks");
    args.d_sinks = pointer<void>(kwargs, "d_sinks");
    args.alibi_slopes = pointer<const float>(kwargs, "alibi_slopes");
    args.key_lengths = pointer<const int32_t>(kwargs, "key_lengths");
    args.q_segments = pointer<const int32_t>(kwargs, "q_segments");
    args.k_segments = pointer<const int32_t>(kwargs, "k_segments");
    return args;
}

py::list isas() {
    py::list names;
    for (const Isa* isa = pyattn::kIsas; isa->name; ++isa) {
        if (isa->usable()) names.append(isa->name);
    }
    return names;
}

void forward(const std::string& isa, const py::kwargs& kwargs) {
    const AttentionArgs args = arguments(kwargs);
    const Isa& chosen = isa_of(isa);
    const py::gil_scoped_release release;
    chosen.forward(args);
}

void backward(const std::string& isa, const py::kwargs& kwargs) {
    const AttentionArgs args = arguments(kwargs);
    const Isa& chosen = isa_of(isa);
    const py::gil_scoped_release release;
    chosen.backward(args);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "pyattn's compiled kernels. Import torch first, so that both share one OpenMP runtime.";
    module.def("isas", &isas, "Instruction sets usable on this machine, best first.");
    module.def("forward", &forward, "Writes out and lse.");
    module.def("backward", &backward, "Writes the gradients; `delta` is scratch.");
}
