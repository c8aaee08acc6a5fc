// Numbers of either kind that tensors here have, float32 and bfloat16 (the upper half of one), in plain C++ that a
// compiler vectorises.

#pragma once

#include <cstdint>
#include <cstring>

inline float read(const float* in) { return *in; }

inline float read(const uint16_t* in) {
    const uint32_t word = static_cast<uint32_t>(*in) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

inline void write(float value, float* out) { *out = value; }

// To nearest even; a NaN whose set bits are all in the lower half would become infinity, but arithmetic makes none.
inline void write(float value, uint16_t* out) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    *out = static_cast<uint16_t>((word + 0x7FFF + ((word >> 16) & 1)) >> 16);
}
