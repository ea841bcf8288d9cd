// Number formats, on a GPU as on the host. Sums are kept in float, those of double in double.
#pragma once

struct half_t {
    u16 bits;
};
struct bf16_t {
    u16 bits;
};

template <class T> struct AccumulatorOf {
    using type = float;
};
template <> struct AccumulatorOf<double> {
    using type = double;
};

DEVICE float widen(float x) { return x; }
DEVICE double widen(double x) { return x; }

DEVICE void round_to(float& y, float x) { y = x; }
DEVICE void round_to(float& y, double x) { y = static_cast<float>(x); }
DEVICE void round_to(double& y, double x) { y = x; }
