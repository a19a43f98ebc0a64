// The stand-in's device: streams, captures, graphs and memory. runtime.cpp and streams.cpp are CUDA's functions on them.
//
// A stream is a queue of what it was told to do, in one of three orders:
//
//   late     (the default) it is worked off when somebody waits for it, or for an event in it, by the thread that waits:
//            who reads without waiting reads what was there earlier. What nobody waits for is done two seconds later, so
//            that nothing hangs here that would not on a GPU.
//   early    a thread for each stream works it off at once, as a GPU does. MPISYNCBN_STANDIN_ORDER=early
//   at once  the call itself does it, and nobody waits for a value: for timing the host (scripts/standin calls). Who rings a
//            bell that still rings does so later.
//
// Memory of cuMemHostAlloc is a mailbox: a copy into it takes its time, and what was copied out of it is gone (NaN). So a
// bell that is rung before its message, or a message taken before its flag, is seen in the values, most surely when late.
//
// Switches of the environment: MPISYNCBN_STANDIN_ORDER=late|early, read when the library is opened;
// MPISYNCBN_STANDIN_PAUSE: microseconds of a copy into a mailbox (200); MPISYNCBN_STANDIN_TIMEOUT: the seconds after which a
// value that was never written ends the process (60); MPISYNCBN_STANDIN_WITHOUT=stream_memory_operations: a driver that has
// none; MPISYNCBN_STANDIN_DEVICES: how many devices the runtime shows (1).
#pragma once
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define ENTRY EXPORT cudaError_t
#define NOTHING(name, ...) ENTRY name(__VA_ARGS__) { return cudaSuccess; }

namespace standin {

using Count = unsigned long long;
using Lock = std::unique_lock<std::mutex>;
using Work = std::function<void()>;
using Clock = std::chrono::steady_clock;

enum class Order { late, early, at_once };

inline const Order order = [] {
    const char *mode = getenv("MPISYNCBN_STANDIN"), *asked = getenv("MPISYNCBN_STANDIN_ORDER");
    if (asked) return strcmp(asked, "early") ? Order::late : Order::early;
    return mode && !strcmp(mode, "calls") ? Order::at_once : Order::late;
}();

inline double number(const char *name, double otherwise) {
    const char *set = getenv(name);
    return set ? atof(set) : otherwise;
}

// Never destroyed: torch calls until the very end.
inline auto &mutex = *new std::mutex;
inline auto &changed = *new std::condition_variable;  // a stream has done something

struct UserObject {
    cudaHostFn_t destroy;
    void *data;
    unsigned references;
};

void call(cudaHostFn_t function, void *data);
void drop(UserObject *object, unsigned count);  // the mutex is not held: it may call the destructor

struct Recorded {  // what a graph and all its executables share
    std::vector<Work> nodes;
    std::map<UserObject *, unsigned> retained;

    ~Recorded() {
        for (auto &[object, count] : retained) drop(object, count);
    }
};
using Graph = std::shared_ptr<Recorded>;  // cudaGraph_t and cudaGraphExec_t point to one

struct Stream;
struct Capture {
    Stream *origin;
    Graph *graph;
    cudaStreamCaptureMode mode;
    std::thread::id thread;
    Count number;
    bool valid = true;
    std::set<Stream *> members = {};
};

struct Stream {
    struct Entry {
        Work work;
        Clock::time_point since;
    };
    std::deque<Entry> queue = {};
    Count put = 0, done = 0;
    bool busy = false, started = false;
    std::condition_variable filled;
    std::shared_ptr<Capture> capture = nullptr;
    Count captured = 0, joined = 0;  // what it recorded, and up to where another stream of the capture has waited for it

    cudaError_t add(Lock &lock, Work work);
    void until(Lock &lock, Count end);

private:
    void take(Lock &lock);
    void work_off();
};

struct Event {
    Stream *stream = nullptr;
    Count at = 0;
    double when = 0;  // milliseconds, of the host
    std::shared_ptr<Capture> capture = nullptr;
};

struct Block {
    size_t bytes;
    cudaMemoryType type;
    int device;
    bool mailbox;
};

inline auto &blocks = *new std::map<char *, Block>;
inline auto &streams = *new std::set<Stream *>;
inline auto &default_stream = *new Stream;
inline auto &captures = *new std::set<Capture *>;
inline thread_local int current_device = 0;
inline thread_local bool on_device = false;  // this thread does what a stream was told
inline thread_local bool in_host_function = false;  // which CUDA allows no call of CUDA
inline thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

inline Stream *of(cudaStream_t stream) { return (size_t)stream <= 2 ? &default_stream : (Stream *)stream; }

inline Block *find(const void *pointer) {
    auto found = blocks.upper_bound((char *)pointer);
    if (found == blocks.begin()) return nullptr;
    --found;
    return (char *)pointer < found->first + found->second.bytes ? &found->second : nullptr;
}

// A host that waits lets go of Python's lock: what it waits for may be a function in Python.
struct Waiting {
    void *python = nullptr;
    Lock lock{mutex, std::defer_lock};

    Waiting();
    ~Waiting();
};

inline void wait_for(Stream *stream, Count end) {
    if (on_device) return;
    Waiting waiting;
    stream->until(waiting.lock, end);
}

inline void wait_for_all() {
    if (on_device) return;
    Waiting waiting;
    default_stream.until(waiting.lock, default_stream.put);
    for (Stream *stream : streams) stream->until(waiting.lock, stream->put);
}

// Why this thread may not make a call that may wait, if so: it is in a host function, or a capture forbids it, which is lost
// then.
cudaError_t refused();

cudaError_t allocate(void **out, size_t bytes, cudaMemoryType type, bool mailbox = false);
cudaError_t copy_late(void *to, const void *from, size_t bytes, cudaStream_t stream);

}  // namespace standin
