// The end of a rank, as a part of MPI_Finalize. The rank tells its groups that it has come to its
// end, and waits for all their ranks. Python is gone by then, and so is everything that a program
// has registered for its end.
//
// MPI_Finalize begins with deleting the attributes of MPI_COMM_SELF, which calls depart_from_all.
// As in link.h, MPI's functions and handles come from mpi4py as numbers.

constexpr int MESSAGE_BYTES = 1024;  // bytes of a message; rank_status.py has the same sizes, tags and times
enum Tag { ASK = 1, ANSWER = 2, DEPARTED = 3 };
constexpr double ASK_SECONDS = 1, ANSWER_SECONDS = 2, FORWARD_SECONDS = 0.25, LONGEST_STEP = 5;  // seconds
constexpr int TIMED_OUT = 124;

struct MPILibrary {
    uintptr_t issend, improbe, mrecv, ibarrier, test, abort, world, byte;
    int any_source;
    bool int_handles;
};

struct DepartingGroup {
    uintptr_t comm;
    int rank;
    long exchanges;                      // of this rank so far
    double timeout;                      // seconds; 0 is none
    std::vector<std::string> hostnames;  // of all ranks
};

inline MPILibrary mpi;
inline std::vector<DepartingGroup> departing_groups;

inline double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline void sleep_for(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

template <class Handle>
class Departure {
  public:
    explicit Departure(const DepartingGroup &departing)
        : group(departing), comm(Collectives::handle<Handle>(departing.comm)) {
        // Neighbours are at distances of powers of two. They are few, and as long as only some
        // ranks have departed, a departed rank has a neighbour that has not. Each message has
        // arrived before its sender enters the barrier, so none is left when the barrier is over
        // (Hoefler, Siebert and Lumsdaine 2010).
        for (int distance = 1; distance < size(); distance *= 2)
            send((group.rank + distance) % size(), DEPARTED, std::to_string(group.exchanges));
    }

    // Receives and answers messages. Returns whether all ranks have come to their end, or MPI has failed.
    bool is_over() {
        std::string text;
        while (receive(mpi.any_source, DEPARTED, text)) continue;
        for (; receive(mpi.any_source, ASK, text); was_asked = true)
            send(std::atoi(text.c_str()), ANSWER,
                 "has come to the end of its program, after exchange number " +
                     std::to_string(group.exchanges));
        sends.remove_if([&](Send &each) { return is_done(&each.request); });
        if (!in_barrier && sends.empty())
            in_barrier = succeeded(((int (*)(Handle, Handle *))mpi.ibarrier)(comm, &barrier));
        return broken || (in_barrier && is_done(&barrier));
    }

    // Asks the other ranks what they are doing, and ends the job: this rank has waited too long.
    void abort_on_timeout(double waited) {
        std::fprintf(
            stderr,
            "mpisyncbn: rank %d of %d on %s has waited %.1f s (the limit is %g s, MPISYNCBN_TIMEOUT) at the "
            "end of its program for other ranks of its group\n",
            group.rank, size(), hostname(group.rank), waited, group.timeout);
        const double start = now(), ask_at = start + ASK_SECONDS * group.rank /
                                                         size();  // one rank that asks is enough
        std::vector<std::string> answers(group.hostnames.size(), "is missing: no answer");
        answers[group.rank] = "waits at the end of its program";
        int missing = size() - 1;
        bool asked = false;
        for (; missing && now() < start + ASK_SECONDS + ANSWER_SECONDS; sleep_for(0.01)) {
            if (is_over()) return;
            if (!asked && !was_asked && now() >= ask_at) {
                asked = true;
                for (int rank = 0; rank < size(); ++rank)
                    if (rank != group.rank) send(rank, ASK, std::to_string(group.rank));
            }
            for (int rank = 0; rank < size(); ++rank) missing -= receive(rank, ANSWER, answers[rank]);
        }
        if (asked) {
            std::fprintf(stderr, "mpisyncbn: what the ranks of the group were doing:\n");
            for (int rank = 0; rank < size(); ++rank)
                std::fprintf(stderr, "  rank %d on %s %s\n", rank, hostname(rank), answers[rank].c_str());
        }
        abort_job();
    }

    double timeout() const { return group.timeout; }

  private:
    static void abort_job() {
        std::fprintf(
            stderr,
            "mpisyncbn: this ends the job with status %d. Every rank must come to the end of its program "
            "within that time of the others. If some rank is only slow, MPISYNCBN_TIMEOUT=<seconds> gives it "
            "more time, and 0 any\n",
            TIMED_OUT);
        sleep_for(FORWARD_SECONDS);
        std::signal(SIGALRM, SIG_DFL);  // kills the process if MPI's abort hangs
        alarm(1);
        ((int (*)(Handle, int))mpi.abort)(Collectives::handle<Handle>(mpi.world), TIMED_OUT);
        std::raise(SIGKILL);
    }

    struct Send {
        std::array<char, MESSAGE_BYTES> text;
        Handle request;
    };

    const DepartingGroup group;
    const Handle comm;
    std::list<Send> sends;
    Handle barrier;
    bool in_barrier = false, broken = false, was_asked = false;
    alignas(16) char status[256];  // MPI writes here, and no code reads it

    int size() const { return (int)group.hostnames.size(); }
    const char *hostname(int rank) const { return group.hostnames[rank].c_str(); }
    bool succeeded(int code) { return broken |= code != 0, code == 0; }

    void send(int rank, int tag, const std::string &text) {
        Send &added = sends.emplace_back();
        added.text.fill(0);
        text.copy(added.text.data(), MESSAGE_BYTES);
        using Issend = int (*)(const void *, int, Handle, int, int, Handle, Handle *);
        if (!succeeded(((Issend)mpi.issend)(added.text.data(), MESSAGE_BYTES, byte(), rank, tag, comm,
                                            &added.request)))
            sends.pop_back();
    }

    bool receive(int source, int tag, std::string &text) {
        using Improbe = int (*)(int, int, Handle, int *, Handle *, void *);
        using Mrecv = int (*)(void *, int, Handle, Handle *, void *);
        int found = 0;
        Handle message;
        char received[MESSAGE_BYTES + 1] = "";
        if (!succeeded(((Improbe)mpi.improbe)(source, tag, comm, &found, &message, status)) || !found)
            return false;
        if (!succeeded(((Mrecv)mpi.mrecv)(received, MESSAGE_BYTES, byte(), &message, status))) return false;
        text = received;
        return true;
    }

    bool is_done(Handle *request) {
        int done = 0;
        return !succeeded(((int (*)(Handle *, int *, void *))mpi.test)(request, &done, status)) || done;
    }

    static Handle byte() { return Collectives::handle<Handle>(mpi.byte); }
};

template <class Handle>
void depart(const std::vector<DepartingGroup> &departing) {
    std::list<Departure<Handle>> waiting(departing.begin(), departing.end());
    double last = now(), waited = 0, pause = 1e-5;
    while (waiting.remove_if([](auto &each) { return each.is_over(); }), !waiting.empty()) {
        sleep_for(pause);
        pause = std::min(2 * pause, 0.01);
        const double time = now();
        waited += std::min(time - last, LONGEST_STEP);  // a longer step means that this process was stopped
        last = time;
        for (auto &each : waiting)
            if (each.timeout() > 0 && waited >= each.timeout()) each.abort_on_timeout(waited);
    }
}

// MPI calls this. It ignores the arguments, one of which is a handle.
inline int depart_from_all(void *, int, void *, void *) {
    const std::vector<DepartingGroup> departing = std::move(departing_groups);
    departing_groups.clear();
    mpi.int_handles ? depart<int>(departing) : depart<void *>(departing);
    return 0;
}

inline int copy_nothing(void *, int, void *, void *, void *, int *flag) { return *flag = 0; }

// Returns whether MPI will call depart_from_all.
template <class Handle>
bool install_finalize_hook(uintptr_t create_keyval, uintptr_t set_attr, uintptr_t comm_self) {
    int keyval;
    using Create = int (*)(decltype(&copy_nothing), decltype(&depart_from_all), int *, void *);
    return ((Create)create_keyval)(&copy_nothing, &depart_from_all, &keyval, nullptr) == 0 &&
           ((int (*)(Handle, int, void *))set_attr)(Collectives::handle<Handle>(comm_self), keyval, nullptr) == 0;
}
