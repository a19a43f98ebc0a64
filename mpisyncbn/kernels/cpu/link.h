// An exchange in one call from Python. Part of module.cpp.

#include "collectives.h"
#include "merging.h"

// An exchange in one call: pack, MPI_Allreduce, check, merge. exchange.py does the same with NumPy
// and mpi4py, in the same order and with the same roundings, but their calls take longer.
//
// Only one thread at a time may use a Link: exchange.py holds the communicator's lock.
struct Link {
    Collectives mpi;
    std::vector<double> message;

    // Sums `message` over the ranks, after setting its first two words to h + flag and h * h.
    // Returns the problem.
    int sum(long h, double flag = 0) {
        message[0] = (double)h + flag, message[1] = (double)h * (double)h;
        int code;
        {
            const nb::gil_scoped_release other_threads_run;
            code = mpi.sum(message.data(), message.size());
        }
        if (code != 0) return code;
        return mpi.same(message[0], message[1]) ? NO_PROBLEM : MISMATCH;
    }

    // Fills the mean and the biased variance of the group, from count, mean and M2 of this rank.
    // Returns the problem, the count of the group, whether some variance has lost digits by
    // cancellation, and whether some rank said that an M2 of its own was absorbed. exchange.py
    // recovers the digits.
    std::tuple<int, long, bool, bool> sum_moments(long h, long count, const Vector &mean, const Vector &m2,
                                                  const Output &merged) {
        const size_t channels = mean.size();
        message.resize(3 + 2 * channels);
        message[2] = (double)count;
        double *const sums = message.data() + 3, *const squares = sums + channels;
        const double flag =
            pack(channels, (double)count, mean.data(), m2.data(), sums, squares) ? ABSORBED_FLAG : 0;
        if (const int problem = sum(h, flag)) return {problem, 0, false, false};
        const bool absorbed = std::fmod(message[0], 1) > 0;
        const double total = message[2], divisor = std::max(total, 1.0);
        const bool cancelled =
            mean_and_var(channels, divisor, sums, squares, merged.data(), merged.data() + channels);
        return {NO_PROBLEM, (long)total, cancelled, absorbed};
    }

    // Fills the sums over the ranks of two vectors of one length. Returns the problem.
    int sum_vectors(long h, const Vector &a, const Vector &b, const Output &totals) {
        const size_t length = a.size();
        message.resize(3 + 2 * length);
        message[2] = 0;
        std::copy(a.data(), a.data() + length, message.data() + 3);
        std::copy(b.data(), b.data() + length, message.data() + 3 + length);
        if (const int problem = sum(h)) return problem;
        std::copy(message.data() + 3, message.data() + 3 + 2 * length, totals.data());
        return NO_PROBLEM;
    }
};
