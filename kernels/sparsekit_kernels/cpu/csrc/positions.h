// Where the four values of 2 rows x 4 columns go, for a mask of eight bits: lane i of the dense tile takes value
// from[mask][i], counted from FIRST, or ZERO, which stands for zero.
#pragma once

template <int FIRST, int ZERO>
struct Positions {
    alignas(64) uint8_t from[256][8];
    constexpr Positions() : from() {
        for (int mask = 0; mask < 256; mask++) {
            int next = 0;
            for (int i = 0; i < 8; i++) from[mask][i] = (uint8_t)((mask >> i & 1) && next < 4 ? FIRST + next++ : ZERO);
        }
    }
};
