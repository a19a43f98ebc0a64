// The exchanges of a communicator in the order of a device's streams: see docs/explanation/transports.md.
//
// The host enqueues an exchange and goes on. When the device comes to it, it writes the message to
// pinned memory and rings the doorbell. The worker, a thread of this file, then sends the message,
// and writes the result and a flag, which the stream waits for. An event orders two exchanges that are
// enqueued on different streams. So the device rings for one exchange at a time, and for all in the
// order in which the host enqueued them, which is the same on every rank.
//
// A slot is free again when the worker has performed a later exchange: the device has gone on then, so
// it has copied the result. A slot of a captured graph is owned until the graph is destroyed, since
// each replay rings for it again.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>
#include <unistd.h>
#include <vector>
#if defined(__linux__)
#include <sys/prctl.h>
#endif

#include "collectives.h"
#include "cuda_driver.h"
#include "merging.h"

enum Kind { SUM_MOMENTS = 0, GATHER_MOMENTS = 1, SUM_VECTORS = 2 };

// The count of a group's batch, which a forward exchange finds out and its backward one divides by.
struct Total {
    double count = std::numeric_limits<double>::quiet_NaN();
};

// The properties of an exchange that are the same each time a layer makes it.
struct Call {
    int kind = SUM_VECTORS, number = 0;  // the caller's number for it, in reports
    size_t channels = 0;                 // for SUM_VECTORS, the number of all values
    long hash = 0, again = 0;            // of the call, and of its second message
    double eps = 0, largest = 0;         // the largest number of the running statistics' dtype

    // Moments: mean, var, invstd; then count, count / (count - 1), and 1 if running statistics may
    // take the batch, else 0. Vectors: their sums, divided by the count if there is a total.
    size_t result_length() const { return kind == SUM_VECTORS ? channels : 3 * channels + 3; }
};

struct Exchange : Call {
    double count = 0;  // values per channel of this rank
    std::shared_ptr<Total> total;
};

struct Slot {
    long sequence = 0;                // of the exchange that uses it, or used it last; 0: none
    std::atomic<bool> owned{false};  // by a graph
    uint32_t number = 0;              // the device writes it to the doorbell
    volatile uint32_t *done = nullptr;
    double *message = nullptr, *result = nullptr;
    size_t room = 0;  // channels
    Exchange what;
};

struct Failure {
    int problem = NO_PROBLEM, call = 0;
    long exchange = 0;
};

class Worker {
   public:
    static constexpr uint32_t MOST_SLOTS = 1 << 14;

    Worker(const Collectives &mpi, volatile uint32_t *doorbell) : mpi(mpi), doorbell(doorbell), slots(MOST_SLOTS) {}

    void start() { thread = std::thread(&Worker::run, this); }

    // Waits until the worker has done all that is enqueued, and has ended.
    void stop() {
        stopping = true;
        wake();
        if (thread.joinable()) thread.join();
    }

    // Wakes the worker if it sleeps. Call it after changing a value that the worker waits for.
    void wake() {
        if (!sleeping) return;
        { const std::lock_guard<std::mutex> lock(mutex); }
        woken.notify_one();
    }

    // How many exchanges are enqueued and not performed.
    long pending() const { return enqueued - performed; }

    Failure failure() {
        const std::lock_guard<std::mutex> lock(mutex);
        return first;
    }
    void forget_failure() {
        const std::lock_guard<std::mutex> lock(mutex);
        first = {};
        failed = false;
    }

    const Collectives mpi;
    volatile uint32_t *const doorbell;
    std::vector<std::atomic<Slot *>> slots;  // by their numbers less 1
    std::atomic<long> exchanges{0};          // begun so far, by the worker and by others for it
    std::atomic<long> enqueued{0}, performed{0};  // by their sequence, without those of graphs
    std::atomic<int> owned{0};               // slots of graphs
    std::atomic<int> current{-1};            // the call that is in MPI; -1: none
    std::atomic<bool> failed{false}, closed{false}, stopping{false}, sleeping{false};
    std::atomic<bool> in_join{false};  // ranks without data serve only exchanges that the host announces

   private:
    void run() {
#if defined(__linux__)
        prctl(PR_SET_TIMERSLACK, 1);  // else each sleep below takes 50 us more
#endif
        while (const uint32_t number = next()) {
            *doorbell = 0;
            Slot &slot = *slots[number - 1].load(std::memory_order_acquire);
            perform(slot);
            const bool owned = slot.owned;
            const long sequence = slot.sequence;  // read before the host may use the slot again
            std::atomic_thread_fence(std::memory_order_release);
            *slot.done = 1;
            if (!owned) performed = sequence;
        }
    }

    // Waits for the doorbell. Returns the number of the slot that the device rings for; 0 at the end.
    uint32_t next() {
        using namespace std::chrono;
        auto since = steady_clock::now();
        bool idle = false;
        for (unsigned tries = 0;; ++tries) {
            if (const uint32_t number = *doorbell) {
                std::atomic_thread_fence(std::memory_order_acquire);
                return number;
            }
            if (tries % 64) {
                pause();
                continue;
            }
            if (stopping && !pending()) return 0;
            // Other threads may need this core, also while the device works for long.
            const auto waited = steady_clock::now() - since;
            if (waited < microseconds(20)) continue;
            if (!pending() && !owned && waited < seconds(1)) {
                // More exchanges will follow soon, and waking this thread would cost the host more.
                std::this_thread::sleep_for(microseconds(50));
                idle = true;
            } else if (!pending() && !owned) {
                std::unique_lock<std::mutex> lock(mutex);
                sleeping = true;
                woken.wait(lock, [&] { return pending() || owned || stopping; });
                sleeping = false, since = steady_clock::now();
            } else if (idle) {
                idle = false, since = steady_clock::now();  // the bell may ring at any moment
            } else if (waited < milliseconds(1)) {
                std::this_thread::yield();
            } else {
                std::this_thread::sleep_for(microseconds(10));
            }
        }
    }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    void perform(Slot &slot) {
        const Exchange &what = slot.what;
        int problem = NO_PROBLEM;
        const bool send = !failed && !closed;
        if (send) {
            current = what.number;
            problem = slot.owned && in_join         ? REPLAY_IN_JOIN
                      : what.kind == GATHER_MOMENTS ? gather(slot)
                      : what.kind == SUM_MOMENTS    ? sum(slot)
                                                    : add(slot);
            current = -1;
            if (problem) fail({problem, what.number, exchanges});
        }
        if (!send || problem) {
            const double nan = std::numeric_limits<double>::quiet_NaN();
            std::fill_n(slot.result, what.result_length(), nan);
            if (what.kind != SUM_VECTORS) {
                slot.result[what.result_length() - 1] = 0;
                if (what.total) what.total->count = nan;
            }
        }
    }

    void fail(const Failure &failure) {
        const std::lock_guard<std::mutex> lock(mutex);
        first = failure;
        failed = true;
    }

    // Begins a message: its fingerprint, and the count of this rank. Returns where its vectors go.
    double *begin(double *message, long hash, double count, double flag = 0) {
        const double h = (double)((hash + ++exchanges * 40503) & ((1 << 18) - 1));
        message[0] = h + flag, message[1] = h * h, message[2] = count;
        return message + 3;
    }

    int sum_message() {
        if (const int code = mpi.sum(buffer.data(), buffer.size())) return code;
        return mpi.same(buffer[0], buffer[1]) ? NO_PROBLEM : MISMATCH;
    }

    int sum(Slot &slot) {
        const Exchange &what = slot.what;
        const size_t channels = what.channels;
        const double *const mean = slot.message, *const m2 = mean + channels;
        buffer.resize(3 + 2 * channels);
        double *const sums = buffer.data() + 3, *const squares = sums + channels;
        const bool absorbed = pack(channels, what.count, mean, m2, sums, squares);
        begin(buffer.data(), what.hash, what.count, absorbed ? ABSORBED_FLAG : 0);
        if (const int problem = sum_message()) return problem;
        double *const mean_of_all = slot.result, *const var = mean_of_all + channels;
        const double total = buffer[2];
        const bool any_absorbed = std::fmod(buffer[0], 1) > 0;
        if (mean_and_var(channels, std::max(total, 1.0), sums, squares, mean_of_all, var))
            if (const int problem = sum_about_mean(slot, total, any_absorbed)) return problem;
        return finish(slot, total);
    }

    // The second message, after digits were lost by cancellation: see exchange.py.
    int sum_about_mean(Slot &slot, double total, bool any_absorbed) {
        const Exchange &what = slot.what;
        const size_t channels = what.channels;
        double *const mean_of_all = slot.result, *const var = mean_of_all + channels;
        origin.resize(channels);
        const bool constant = find_origins(channels, mean_of_all, var, origin.data());
        if (constant && !any_absorbed) {
            for (size_t c = 0; c < channels; ++c)
                if (var[c] < CANCELLATION * (mean_of_all[c] * mean_of_all[c])) var[c] = 0;
            return NO_PROBLEM;
        }
        double *const sums = begin(buffer.data(), what.again, what.count), *const squares = sums + channels;
        for (size_t c = 0; c < channels; ++c) {
            const double distance = slot.message[c] - origin[c];
            sums[c] = distance * what.count;
            squares[c] = distance * sums[c] + slot.message[channels + c];
        }
        if (const int problem = sum_message()) return problem;
        mean_and_var(channels, std::max(total, 1.0), sums, squares, mean_of_all, var);
        for (size_t c = 0; c < channels; ++c) {
            const double distance = mean_of_all[c];
            var[c] *= var[c] > ROUNDING * (distance * distance) ? 1 : 0;
            mean_of_all[c] = origin[c] + distance;
        }
        return NO_PROBLEM;
    }

    int gather(Slot &slot) {
        const Exchange &what = slot.what;
        const size_t length = 3 + 3 * what.channels;
        buffer.resize(length * mpi.size);
        double *const mine = begin(buffer.data() + length * mpi.rank, what.hash, what.count);
        std::copy_n(slot.message, 3 * what.channels, mine);
        if (const int code = mpi.gather(buffer.data(), length)) return code;
        double sum_h = 0, sum_hh = 0;
        for (int rank = 0; rank < mpi.size; ++rank)
            sum_h += buffer[rank * length], sum_hh += buffer[rank * length + 1];
        if (!mpi.same(sum_h, sum_hh)) return MISMATCH;
        const size_t channels = what.channels;
        return finish(slot, merge_rows(mpi.size, channels, buffer.data(), slot.result, slot.result + channels));
    }

    int add(Slot &slot) {
        const Exchange &what = slot.what;
        const size_t length = what.channels;
        buffer.resize(3 + length);
        std::copy_n(slot.message, length, begin(buffer.data(), what.hash, 0));
        if (const int problem = sum_message()) return problem;
        const double count = what.total ? what.total->count : 1, divisor = count == 0 ? 1 : count;
        for (size_t c = 0; c < length; ++c) slot.result[c] = buffer[3 + c] / divisor;
        return NO_PROBLEM;
    }

    // Completes a result that has mean and variance.
    int finish(Slot &slot, double total) {
        const Exchange &what = slot.what;
        const size_t channels = what.channels;
        const double *const mean = slot.result, *const var = mean + channels;
        inverse_deviations(channels, var, what.eps, slot.result + 2 * channels);
        const double to_unbiased = total / std::max(total - 1, 1.0);
        bool fits = total > 0;
        for (size_t c = 0; c < channels; ++c)
            fits &= std::fabs(mean[c]) <= what.largest && var[c] * to_unbiased <= what.largest;
        double *const more = slot.result + 3 * channels;
        more[0] = total, more[1] = to_unbiased, more[2] = fits;
        if (what.total) what.total->count = total;
        return total == 1 ? ONE_VALUE : NO_PROBLEM;
    }

    std::thread thread;
    std::mutex mutex;
    std::condition_variable woken;
    Failure first;
    std::vector<double> buffer, origin;
};
