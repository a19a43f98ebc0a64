// Compiled kernels with their arguments, to be launched without Python.
#pragma once

#include <array>
#include <vector>

#include "cuda_driver.h"
#include "worker.h"

using Pointers = std::array<uint64_t, 16>;
constexpr size_t MOST_ARGUMENTS = 64;

// A compiled kernel with its arguments. Only the pointers differ between calls.
struct Launch {
    struct Argument {
        int pointer;  // its place among the pointers of a call; VALUE: none, MESSAGE: the slot's message
        uint64_t value;
    };
    enum { VALUE = -1, MESSAGE = -2 };
    void *function;
    unsigned grid[3], threads, shared;
    std::vector<Argument> arguments;  // at most MOST_ARGUMENTS

    void run(const Driver &driver, Driver::Stream stream, const Pointers &pointers, const Slot &slot) const {
        uint64_t values[MOST_ARGUMENTS];
        void *addresses[MOST_ARGUMENTS];
        size_t i = 0;
        for (const auto &each : arguments) {
            values[i] = each.pointer == VALUE     ? each.value
                        : each.pointer == MESSAGE ? (uint64_t)slot.message
                                                  : pointers.at(each.pointer);
            addresses[i] = values + i;
            ++i;
        }
        driver.check(driver.cuLaunchKernel(function, grid[0], grid[1], grid[2], threads, 1, 1, shared, stream,
                                           addresses, nullptr),
                     "cuLaunchKernel");
    }
};

struct Launches {
    std::vector<Launch> all;

    void run(const Driver &driver, Driver::Stream stream, const Pointers &pointers, const Slot &slot) const {
        for (const auto &each : all) each.run(driver, stream, pointers, slot);
    }
};
