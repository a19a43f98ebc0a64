// Pinned memory for messages. Memory of a communicator that is gone is kept for later ones, because to
// free it the host would have to wait for the device.
#pragma once

#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "cuda_driver.h"

class PinnedMemory {
   public:
    // Returns memory that is all zeros.
    static void *take(const Driver &driver, size_t bytes) {
        void *memory = reuse({driver.library, bytes});
        if (!memory) memory = allocate(driver, bytes);
        memset(memory, 0, bytes);
        return memory;
    }

    // Gives back memory that neither the host nor the device uses.
    static void give_back(const Driver &driver, void *memory, size_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex());
        unused().emplace(Key{driver.library, bytes}, memory);
    }

   private:
    using Key = std::pair<const void *, size_t>;

    // Neither is ever destroyed, because a communicator may outlive static objects.
    static std::multimap<Key, void *> &unused() { return *new_once<std::multimap<Key, void *>>(); }
    static std::mutex &mutex() { return *new_once<std::mutex>(); }
    template <class T> static T *new_once() {
        static T *const made = new T;
        return made;
    }

    static void *reuse(const Key &key) {
        const std::lock_guard<std::mutex> lock(mutex());
        const auto found = unused().find(key);
        if (found == unused().end()) return nullptr;
        void *const memory = found->second;
        unused().erase(found);
        return memory;
    }

    static void *allocate(const Driver &driver, size_t bytes) {
        int mode = RELAXED;  // a capture on any stream forbids it otherwise
        driver.check(driver.cuThreadExchangeStreamCaptureMode(&mode), "cuThreadExchangeStreamCaptureMode");
        void *memory = nullptr;
        const int error = driver.cuMemHostAlloc(&memory, bytes, HOST_PORTABLE | HOST_MAPPED);
        driver.cuThreadExchangeStreamCaptureMode(&mode);
        driver.check(error, "cuMemHostAlloc");
        return memory;
    }
};
