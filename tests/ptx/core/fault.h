// What the code under test did wrong. Whoever catches it adds where: the instruction, the CTA and the warp.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <string>

namespace ptx {

struct Fault {
    std::string text;
};

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    char text[1024];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    throw Fault{text};
}

}  // namespace ptx
