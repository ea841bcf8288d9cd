// Instructions that do one thing in every lane: D d = EXPRESSION of A x, B y and C z, operands 1 to 3, and of `sub`.
#pragma once

#include "step.h"

#define PTX_UNARY(NAME, D, A, EXPRESSION)       \
    void execute_##NAME(Step& s) {              \
        const A* a = s.of<A>(1);                \
        s.each(s.of<D>(0), [=](int lane) -> D { \
            const A x = a[lane];                \
            return EXPRESSION;                  \
        });                                     \
    }
#define PTX_BINARY(NAME, D, A, B, EXPRESSION)   \
    void execute_##NAME(Step& s) {              \
        const A* a = s.of<A>(1);                \
        const B* b = s.of<B>(2);                \
        s.each(s.of<D>(0), [=](int lane) -> D { \
            const A x = a[lane];                \
            const B y = b[lane];                \
            return EXPRESSION;                  \
        });                                     \
    }
#define PTX_TERNARY(NAME, D, A, B, C, EXPRESSION) \
    void execute_##NAME(Step& s) {                \
        const A* a = s.of<A>(1);                  \
        const B* b = s.of<B>(2);                  \
        const C* c = s.of<C>(3);                  \
        [[maybe_unused]] const int sub = s.i.sub; \
        s.each(s.of<D>(0), [=](int lane) -> D {   \
            const A x = a[lane];                  \
            const B y = b[lane];                  \
            const C z = c[lane];                  \
            return EXPRESSION;                    \
        });                                       \
    }
