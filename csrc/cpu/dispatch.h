// The instruction sets this extension was compiled for, and which of them the machine has.
#pragma once

#include "../attention_args.h"
#include "../linear_args.h"

namespace pyattn {

struct Isa {
    const char* name;
    bool (*usable)();  // CPU and operating system
    void (*forward)(const AttentionArgs&);
    void (*backward)(const AttentionArgs&);
    void (*linear)(const LinearArgs&);
    double (*spin)(Dtype, int64_t);
};

// Best first, ended by a null name.
extern const Isa kIsas[];

// Operations per second of this many threads that do nothing but multiply-adds of `dtype`; the best of a few tries.
double multiply_add_rate(const Isa& isa, Dtype dtype, int threads);

}  // namespace pyattn
