// The stand-in's device: streams, captures, graphs and memory. runtime.cpp and streams.cpp have CUDA's functions.
//
// A stream is a queue of work. One of three orders says when the work is done:
//
//   late     (the default) a thread that waits for the stream, or for an event in it, does the work. A read without a wait
//            finds the old values. Work that no thread waits for is done after two seconds, so that nothing hangs here that
//            would not hang on a GPU.
//   early    a thread for each stream does the work at once, as a GPU does. MPISYNCBN_STANDIN_ORDER=early
//   at once  the call itself does the work, and no stream waits for a value: to time the host (scripts/standin calls). A
//            nonzero value is written to a doorbell (a number that its reader sets to 0) only when the doorbell is 0.
//
// Memory of cuMemHostAlloc is a mailbox: a copy into it begins with a pause, and a copy out of it leaves NaN behind. So the
// values are wrong if a doorbell is rung before its message is there, or a message is read before its flag, most surely in
// the order late.
//
// Environment variables: MPISYNCBN_STANDIN_ORDER=late|early, read when the library is opened;
// MPISYNCBN_STANDIN_PAUSE: the pause before a copy into a mailbox, in microseconds (200); MPISYNCBN_STANDIN_TIMEOUT: the
// seconds that a stream waits for a value before the process is aborted (60);
// MPISYNCBN_STANDIN_WITHOUT=stream_memory_operations: a driver without these operations; MPISYNCBN_STANDIN_DEVICES: the
// number of devices of the runtime (1).
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

// These are never destroyed, because torch calls CUDA until the process ends.
inline auto &mutex = *new std::mutex;
inline auto &changed = *new std::condition_variable;  // a stream has done something

struct UserObject {
    cudaHostFn_t destroy;
    void *data;
    unsigned references;
};

void call(cudaHostFn_t function, void *data);
void drop(UserObject *object, unsigned count);  // call it without holding the mutex: it may call `destroy`

struct Recorded {  // shared by a graph and all its executables
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
    Count captured = 0, joined = 0;  // entries that it recorded; those that another stream of the capture has waited for

    cudaError_t add(Lock &lock, Work work);
    void until(Lock &lock, Count end);

private:
    void take(Lock &lock);
    void work_off();
};

struct Event {
    Stream *stream = nullptr;
    Count at = 0;
    double when = 0;  // milliseconds of the host's clock
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
inline thread_local bool on_device = false;  // this thread does the work of a stream
inline thread_local bool in_host_function = false;  // a host function may not call CUDA
inline thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

inline Stream *of(cudaStream_t stream) { return (size_t)stream <= 2 ? &default_stream : (Stream *)stream; }

inline Block *find(const void *pointer) {
    auto found = blocks.upper_bound((char *)pointer);
    if (found == blocks.begin()) return nullptr;
    --found;
    return (char *)pointer < found->first + found->second.bytes ? &found->second : nullptr;
}

// Releases Python's GIL while the host waits, because it may wait for a Python function.
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

// The error if this thread may not make a call that can wait, because it is in a host function, or because a capture forbids
// it. That capture is invalid then.
cudaError_t refused();

cudaError_t allocate(void **out, size_t bytes, cudaMemoryType type, bool mailbox = false);
cudaError_t copy_late(void *to, const void *from, size_t bytes, cudaStream_t stream);

}  // namespace standin
