// The instruction sets this extension was compiled for, and which of them the machine has.
#pragma once

#include "../attention_args.h"

namespace pyattn {

struct Isa {
    const char* name;
    bool (*usable)();  // CPU and operating system
    void (*forward)(const AttentionArgs&);
    void (*backward)(const AttentionArgs&);
};

// Best first, ended by a null name.
extern const Isa kIsas[];

}  // namespace pyattn
