// MPI's collectives, and the fingerprint of their messages.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

// The problem of an exchange: none, MISMATCH if the ranks sent different fingerprints, ONE_VALUE if the
// group has a single value per channel, REPLAY_IN_JOIN if a captured graph was replayed inside join,
// else MPI's error code, which is positive.
enum Problem { NO_PROBLEM = 0, MISMATCH = -1, ONE_VALUE = -2, REPLAY_IN_JOIN = -3 };

// MPI's functions and handles come from mpi4py as numbers, so that one build serves every MPI
// library. A handle is an int in some libraries (MPICH and its relatives), a pointer in others
// (Open MPI).
struct Collectives {
    uintptr_t allreduce, allgather, comm, datatype, op, in_place;
    bool int_handles;
    int size, rank;

    // Sums a message over the ranks, in place. Returns MPI's error code.
    int sum(double *message, size_t length) const {
        return int_handles ? sum_by<int>(message, length) : sum_by<void *>(message, length);
    }

    // Gathers the rows of all ranks; this rank's own is in its place. Returns MPI's error code.
    int gather(double *rows, size_t length) const {
        return int_handles ? gather_by<int>(rows, length) : gather_by<void *>(rows, length);
    }

    // Whether all ranks sent the same fingerprint h, by the sums of h and of h * h: Cauchy-Schwarz,
    // see fingerprint.py. The sums may not be finite if MPI mixed up messages of different lengths.
    bool same(double sum_h, double sum_hh) const {
        if (!(sum_h >= 0 && sum_h < 0x1p53 && sum_hh >= 0 && sum_hh < 0x1p53)) return false;
        using Integer = unsigned __int128;
        return (Integer)size * (Integer)sum_hh == (Integer)sum_h * (Integer)sum_h;
    }

    template <class Handle>
    static Handle handle(uintptr_t number) {
        if constexpr (std::is_pointer_v<Handle>)
            return (Handle)number;
        else
            return (Handle)(intptr_t)number;
    }

   private:
    template <class Handle>
    int sum_by(double *message, size_t length) const {
        using Function = int (*)(const void *, void *, int, Handle, Handle, Handle);
        return ((Function)allreduce)((const void *)in_place, message, (int)length, handle<Handle>(datatype),
                                     handle<Handle>(op), handle<Handle>(comm));
    }
    template <class Handle>
    int gather_by(double *rows, size_t length) const {
        using Function = int (*)(const void *, int, Handle, void *, int, Handle, Handle);
        const Handle type = handle<Handle>(datatype);
        return ((Function)allgather)((const void *)in_place, (int)length, type, rows, (int)length, type,
                                     handle<Handle>(comm));
    }
};
