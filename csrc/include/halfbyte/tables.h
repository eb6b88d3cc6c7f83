// clang-format off
// tables.h: the 4-bit code tables as constants.
//
// Made from core/halfbyte/formats.py by `nox -s tables`; do not edit.  Of a format: the level of each
// code; the bits of the thresholds, ascending; the code of each interval between them, lowest first.
// FP4's thresholds are on the magnitude, and a negative value has 8 added to its code.
#pragma once
#include <stdint.h>

namespace halfbyte {

inline constexpr float nf4_levels[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};
inline constexpr uint32_t nf4_threshold_bits[15] = {
    0xbf591cd9u, 0xbf1c5270u, 0xbeeb8480u, 0xbeadea76u,
    0xbe703cecu, 0xbe0d38bcu, 0xbd3a7871u, 0x3d22faffu,
    0x3df64863u, 0x3e5067e0u, 0x3e9582d4u, 0x3ec753f9u,
    0x3f006d03u, 0x3f248dafu, 0x3f5c89d9u,
};
inline constexpr uint8_t nf4_order[16] = {
    0, 1, 2, 3,
    4, 5, 6, 7,
    8, 9, 10, 11,
    12, 13, 14, 15,
};

inline constexpr float fp4_levels[16] = {
    0.0f, 0.0052083334885537624f, 0.6666666865348816f, 1.0f,
    0.3333333432674408f, 0.5f, 0.1666666716337204f, 0.25f,
    0.0f, -0.0052083334885537624f, -0.6666666865348816f, -1.0f,
    -0.3333333432674408f, -0.5f, -0.1666666716337204f, -0.25f,
};
inline constexpr uint32_t fp4_threshold_bits[7] = {
    0x3b2aaab9u, 0x3db00000u, 0x3e555555u, 0x3e955555u,
    0x3ed55556u, 0x3f155550u, 0x3f555555u,
};
inline constexpr uint8_t fp4_order[8] = {
    0, 1, 6, 7,
    4, 5, 2, 3,
};

}  // namespace halfbyte
