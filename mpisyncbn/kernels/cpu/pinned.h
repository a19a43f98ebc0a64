// Pinned memory for messages. Memory of a communicator that is gone is kept for later ones, because to
// free it the host would have to wait for the device.
#pragma once

#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "cuda_driver.h"

namespace pinned {

using Key = std::pair<const void *, size_t>;  // the driver's library, and the number of bytes

// Neither is ever destroyed, because a communicator may outlive static objects.
inline auto &unused = *new std::multimap<Key, void *>;
inline auto &mutex = *new std::mutex;

// Returns memory that is all zeros.
inline void *take(const Driver &driver, size_t bytes) {
    void *memory = nullptr;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        if (const auto found = unused.extract(Key{driver.library, bytes})) memory = found.mapped();
    }
    if (!memory) {
        int mode = RELAXED;  // a capture on any stream forbids it otherwise
        driver.check(driver.cuThreadExchangeStreamCaptureMode(&mode), "cuThreadExchangeStreamCaptureMode");
        const int error = driver.cuMemHostAlloc(&memory, bytes, HOST_PORTABLE | HOST_MAPPED);
        driver.cuThreadExchangeStreamCaptureMode(&mode);
        driver.check(error, "cuMemHostAlloc");
    }
    memset(memory, 0, bytes);
    return memory;
}

// Gives back memory that neither the host nor the device uses.
inline void give_back(const Driver &driver, void *memory, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    unused.emplace(Key{driver.library, bytes}, memory);
}

}  // namespace pinned
