// The implementation of the stand-in's device: see device.h.
#include "device.h"

namespace standin {

namespace {

template <class Function>
Function *symbol(const char *name) {
    return (Function *)dlsym(RTLD_DEFAULT, name);
}

}  // namespace

Waiting::Waiting() {
    static const auto initialized = symbol<int()>("Py_IsInitialized"), held = symbol<int()>("PyGILState_Check");
    static const auto mine = symbol<void *()>("PyGILState_GetThisThreadState");
    static const auto save = symbol<void *()>("PyEval_SaveThread");
    if (initialized && held && mine && save && initialized() && mine() && held()) python = save();
    lock.lock();
}

Waiting::~Waiting() {
    static const auto restore = symbol<void(void *)>("PyEval_RestoreThread");
    lock.unlock();
    if (python) restore(python);
}

void call(cudaHostFn_t function, void *data) {
    const bool before = std::exchange(in_host_function, true);
    function(data);
    in_host_function = before;
}

void drop(UserObject *object, unsigned count) {
    {
        const Lock lock(mutex);
        if (object->references -= count) return;
    }
    call(object->destroy, object->data);
    delete object;
}

cudaError_t Stream::add(Lock &lock, Work work) {
    if (in_host_function) return cudaErrorNotPermitted;
    if (capture) {
        if (!capture->valid) return cudaErrorStreamCaptureInvalidated;
        ++captured;
        (*capture->graph)->nodes.push_back(std::move(work));
        return cudaSuccess;
    }
    ++put;
    if (order == Order::at_once) {
        lock.unlock();
        if (work) work();
        lock.lock();
        ++done;
        changed.notify_all();
        return cudaSuccess;
    }
    queue.push_back({std::move(work), Clock::now()});
    if (!started) std::thread([this] { work_off(); }).detach();
    started = true;
    filled.notify_one();
    return cudaSuccess;
}

void Stream::take(Lock &lock) {
    Work work = std::move(queue.front().work);
    queue.pop_front();
    busy = true;
    lock.unlock();
    const bool before = std::exchange(on_device, true);
    if (work) work();
    work = nullptr;  // this may free the last reference to a graph
    on_device = before;
    lock.lock();
    busy = false;
    ++done;
    changed.notify_all();
}

void Stream::work_off() {
    Lock lock(mutex);
    for (;;) {
        filled.wait(lock, [this] { return !queue.empty(); });
        const auto due = queue.front().since + std::chrono::seconds(order == Order::late ? 2 : 0);
        if (busy)
            changed.wait(lock);
        else if (Clock::now() < due)
            changed.wait_until(lock, due);
        else
            take(lock);
    }
}

void Stream::until(Lock &lock, Count end) {
    while (done < end) {
        if (busy || order != Order::late)
            changed.wait(lock);
        else
            take(lock);
    }
}

cudaError_t refused() {
    if (in_host_function) return cudaErrorNotPermitted;
    if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    cudaError_t found = cudaSuccess;
    for (Capture *capture : captures) {
        const bool mine = capture->thread == std::this_thread::get_id() && capture->mode != cudaStreamCaptureModeRelaxed;
        const bool all = thread_mode == cudaStreamCaptureModeGlobal && capture->mode == cudaStreamCaptureModeGlobal;
        if (mine || all) capture->valid = false, found = cudaErrorStreamCaptureUnsupported;
    }
    return found;
}

cudaError_t allocate(void **out, size_t bytes, cudaMemoryType type, bool mailbox) {
    const Lock lock(mutex);
    bytes = (bytes / 512 + 1) * 512;
    if (!(*out = aligned_alloc(512, bytes))) return cudaErrorMemoryAllocation;
    memset(*out, mailbox ? 0xFF : 0xA5, bytes);
    blocks[(char *)*out] = {bytes, type, current_device, mailbox};
    return cudaSuccess;
}

cudaError_t copy_late(void *to, const void *from, size_t bytes, cudaStream_t stream) {
    Lock lock(mutex);
    const Block *there = find(to), *here = find(from);
    const bool timed = order == Order::at_once;
    const bool posts = there && there->mailbox && !timed, takes = here && here->mailbox && !timed;
    const cudaError_t error = of(stream)->add(lock, [=] {
        if (posts) std::this_thread::sleep_for(std::chrono::microseconds((int)number("MPISYNCBN_STANDIN_PAUSE", 200)));
        memmove(to, from, bytes);
        if (takes) memset((void *)from, 0xFF, bytes);
    });
    if (error || of(stream)->capture || (there && here)) return error;
    const Count end = of(stream)->put;  // memory that is not pinned is copied while the host waits
    lock.unlock();
    return wait_for(of(stream), end), cudaSuccess;
}

}  // namespace standin
