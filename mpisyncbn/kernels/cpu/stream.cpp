// The Python interface of the stream transport, which enqueues exchanges on the streams of a device.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <deque>
#include <map>
#include <optional>

#include "launches.h"
#include "pinned.h"
#include "tensors.h"
#include "worker.h"

namespace nb = nanobind;

namespace {

struct StreamWorker {
    static constexpr size_t MOST_EAGER = 256, DOORBELL_BYTES = 64;
    const Driver driver;
    const Collectives mpi;
    const long pid = getpid();
    std::unique_ptr<Worker> worker;  // from the first exchange on: pinned memory needs a device
    std::deque<Slot> slots;          // all, whose addresses stay
    std::vector<Slot *> eager;       // those that are used in turn
    size_t turn = 0;
    long exchanges_before = 0;
    struct Place {  // where an exchange was enqueued
        Driver::Stream stream;
        void *context;
        uint64_t capture;
        void *event;  // follows the exchange if its stream is PER_THREAD; else it is not recorded yet
    };
    std::optional<Place> last, last_captured;          // captured exchanges have an order of their own
    std::map<int, void *> primary;                     // contexts, by the number of the device
    std::map<std::pair<void *, bool>, void *> events;  // by context, and whether they are captured

    StreamWorker(const std::string &path, uintptr_t allreduce, uintptr_t allgather, uintptr_t comm,
                 uintptr_t datatype, uintptr_t op, intptr_t in_place, bool int_handles, int size, int rank)
        : driver(path), mpi{allreduce, allgather, comm, datatype, op, (uintptr_t)in_place, int_handles, size, rank} {}

    ~StreamWorker() {
        if (!worker) return;
        if (getpid() != pid || worker->owned || worker->pending()) {
            worker.release();  // only the parent has the thread; or graphs ring for it; or MPI does not return
            new std::deque<Slot>(std::move(slots));  // never freed: the worker goes on using the slots
            return;
        }
        const nb::gil_scoped_release other_threads_run;
        worker->stop();
        for (const Slot &each : slots)
            if (each.room && !is_in_use(each)) give_back(each);
        pinned::give_back(driver, (void *)worker->doorbell, DOORBELL_BYTES);
    }

    // Enqueues kernels, an exchange and further kernels. The message comes from vectors on the device,
    // if any are given; else the kernels write it. The result is copied to `out` on the device.
    void enqueue(std::tuple<int, uintptr_t> device_and_stream, const Call &call, double count,
                 std::shared_ptr<Total> total, const Launches *before, const std::vector<uint64_t> &vectors,
                 uint64_t out, const Launches *after, nb::tuple given) {
        const auto [device, stream_number] = device_and_stream;
        Pointers pointers{};
        for (size_t i = 0; i < given.size(); ++i) {
            pointers.at(i) = tensors::address_of(given[i].ptr());
            if (PyErr_Occurred()) throw nb::python_error();
        }
        // A driver whose queue is full waits for the device, and Python's other threads must not.
        const nb::gil_scoped_release other_threads_run;
        if (worker && worker->stopping) throw std::runtime_error("the program is at its end: no exchange can follow");
        const Driver::Stream stream = (Driver::Stream)stream_number;
        void *const context = context_of(device);
        const InContext on_device(driver, context);
        const auto [capture, graph] = capture_of(stream);
        if (!worker) make_worker();
        Slot &slot = take_slot(call.channels, graph);
        slot.what = {call, count, std::move(total)};
        if (before) before->run(driver, stream, pointers, slot);
        const Place &place = follow_last(stream, context, capture);
        copy_vectors(slot, vectors, stream);
        const auto word = [](uint32_t operation, const volatile uint32_t *address, uint64_t value, uint32_t flags) {
            Driver::MemoryOperation made{};
            made.parts = {operation, 0, (Driver::Pointer)address, value, flags};
            return made;
        };
        Driver::MemoryOperation operations[] = {word(WRITE_VALUE_32, worker->doorbell, slot.number, 0),
                                                word(WAIT_VALUE_32, slot.done, 1, WAIT_EQUAL),
                                                word(WRITE_VALUE_32, slot.done, 0, 0)};
        driver.check(driver.cuStreamBatchMemOp_v2(stream, 3, operations, 0), "cuStreamBatchMemOp");
        if (!graph) ++worker->enqueued;
        worker->wake();
        copy(out, (Driver::Pointer)slot.result, 8 * call.result_length(), stream);
        if (stream == PER_THREAD) record(place);  // another thread cannot name this stream
        if (after) after->run(driver, stream, pointers, slot);
    }

    // Waits until all enqueued exchanges are done, and all work of captured graphs, on any stream. The
    // caller has released Python's lock.
    void wait() {
        if (!worker) return;
        if (worker->owned)
            for (const auto &[key, event] : events) {
                const InContext there(driver, key.first);
                driver.check(driver.cuCtxSynchronize(), "cuCtxSynchronize");
            }
        if (!worker->pending()) return;
        const InContext there(driver, last->context);
        while (worker->pending())
            if (last->stream == PER_THREAD) driver.check(driver.cuEventSynchronize(last->event), "cuEventSynchronize");
            else if (capture_of(last->stream).first) std::this_thread::yield();
            else driver.check(driver.cuStreamSynchronize(last->stream), "cuStreamSynchronize");
    }

    std::tuple<int, int, long> failure() {
        const Failure found = worker ? worker->failure() : Failure{};
        return {found.problem, found.call, found.exchange};
    }

   private:
    // The number of the capture that a stream is in, and its graph; 0 if there is none.
    std::pair<uint64_t, void *> capture_of(Driver::Stream stream) const {
        int status = 0;
        uint64_t number = 0;
        void *graph = nullptr;
        driver.check(driver.cuStreamGetCaptureInfo_v2(stream, &status, &number, &graph, nullptr, nullptr),
                     "cuStreamGetCaptureInfo");
        return status == CAPTURING ? std::pair(number, graph) : std::pair(uint64_t{}, (void *)nullptr);
    }

    // The current context if it is one of the device, else the device's primary one.
    void *context_of(int number) {
        void *context = nullptr;
        int device = 0;
        if (!driver.cuCtxGetCurrent(&context) && context && !driver.cuCtxGetDevice(&device) && device == number)
            return context;
        void *&found = primary[number];
        return found ? found : found = driver.primary_context(number);
    }

    void make_worker() {
        worker = std::make_unique<Worker>(mpi, (uint32_t *)pinned::take(driver, DOORBELL_BYTES));
        worker->exchanges = exchanges_before;
        worker->start();
    }

    // A slot with room for the channels: one that the graph owns, or one of those that are used in turn.
    Slot &take_slot(size_t channels, void *graph) {
        if (graph) {
            Slot &slot = free_slot(channels);
            slot.owned = true;
            ++worker->owned;
            retain(slot, graph);
            return slot;
        }
        Slot *slot = nullptr;
        for (size_t tries = 0; tries < eager.size() && !slot; ++tries) {
            Slot *const next = eager[turn];
            if (is_in_use(*next)) break;  // later slots are in use too
            turn = (turn + 1) % eager.size();
            if (next->room >= channels) slot = next;
        }
        if (!slot && eager.size() >= MOST_EAGER) {
            wait();
            if (is_in_use(*eager[turn])) turn = (turn + 1) % eager.size();
            slot = eager[turn];
            turn = (turn + 1) % eager.size();
            if (slot->room < channels) give_memory(*slot, channels);
        } else if (!slot) {
            slot = &new_slot(channels);
            eager.insert(eager.begin() + turn, slot);
            turn = (turn + 1) % eager.size();
        }
        slot->sequence = worker->enqueued + 1;
        return *slot;
    }

    Slot &free_slot(size_t channels) {
        for (auto &each : slots)
            if (!each.owned && each.room >= channels &&
                std::find(eager.begin(), eager.end(), &each) == eager.end())
                return each;
        return new_slot(channels);
    }

    Slot &new_slot(size_t channels) {
        if (slots.size() >= Worker::MOST_SLOTS) throw std::runtime_error("more exchanges in captured graphs than 16384");
        Slot &slot = slots.emplace_back();
        give_memory(slot, channels);
        slot.number = (uint32_t)slots.size();
        worker->slots[slot.number - 1].store(&slot, std::memory_order_release);
        return slot;
    }

    // Gives memory for so many channels to a slot that is not in use.
    void give_memory(Slot &slot, size_t channels) {
        size_t room = 64;
        while (room < channels) room *= 2;
        auto *const memory = (double *)pinned::take(driver, bytes_of(room));
        if (slot.room) give_back(slot);
        slot.done = (uint32_t *)memory, slot.message = memory + 8, slot.result = slot.message + 3 * room;
        slot.room = room;
    }

    static size_t bytes_of(size_t room) { return 64 + 8 * (3 * room + 3 * room + 3); }
    void give_back(const Slot &slot) { pinned::give_back(driver, (void *)slot.done, bytes_of(slot.room)); }

    // Whether an exchange outside of graphs needs a slot. The device may still copy the result of the
    // last one that is performed.
    bool is_in_use(const Slot &slot) const { return slot.sequence && slot.sequence >= worker->performed; }

    // Gives the slot back when the graph, and all that was made of it, is destroyed.
    void retain(Slot &slot, void *graph) {
        struct Owner {
            Slot *slot;
            Worker *worker;
        };
        void *object = nullptr;
        const auto give_back = [](void *pointer) {
            const std::unique_ptr<Owner> owner((Owner *)pointer);
            owner->slot->owned = false;
            --owner->worker->owned;
        };
        driver.check(driver.cuUserObjectCreate(&object, new Owner{&slot, worker.get()}, give_back, 1, NO_SYNC),
                     "cuUserObjectCreate");
        driver.check(driver.cuGraphRetainUserObject(graph, object, 1, MOVE), "cuGraphRetainUserObject");
    }

    // Orders this exchange after the last one of the same capture, or the last one outside of all
    // captures, if that was enqueued on another stream.
    const Place &follow_last(Driver::Stream stream, void *context, uint64_t capture) {
        std::optional<Place> &before = capture ? last_captured : last;
        const bool recorded = before && before->stream == PER_THREAD;
        const bool moved = before && (before->stream != stream || before->context != context || recorded);
        if (moved && before->capture == capture) {
            if (!capture && !recorded && is_captured(*before)) {
                while (worker->pending()) std::this_thread::yield();  // an event would be captured
            } else {
                if (!recorded) record(*before);
                driver.check(driver.cuStreamWaitEvent(stream, before->event, 0), "cuStreamWaitEvent");
            }
        }
        void *&event = events[{context, capture != 0}];  // an event and its stream are of one context
        if (!event) driver.check(driver.cuEventCreate(&event, NO_TIMING), "cuEventCreate");
        return before.emplace(Place{stream, context, capture, event});
    }

    bool is_captured(const Place &place) const {
        const InContext there(driver, place.context);
        return capture_of(place.stream).first;
    }

    void record(const Place &place) const {
        const InContext there(driver, place.context);  // that of stream 0 is the current one
        driver.check(driver.cuEventRecord(place.event, place.stream), "cuEventRecord");
    }

    // Copies vectors of one length to the message, those that lie side by side in one copy.
    void copy_vectors(Slot &slot, const std::vector<uint64_t> &vectors, Driver::Stream stream) {
        const size_t each = slot.what.kind == SUM_VECTORS ? slot.what.channels / std::max<size_t>(vectors.size(), 1)
                                                          : slot.what.channels;
        for (size_t i = 0; i < vectors.size();) {
            size_t end = i + 1;
            while (end < vectors.size() && vectors[end] == vectors[i] + (end - i) * 8 * each) ++end;
            copy((Driver::Pointer)(slot.message + i * each), vectors[i], (end - i) * 8 * each, stream);
            i = end;
        }
    }

    void copy(Driver::Pointer to, Driver::Pointer from, size_t bytes, Driver::Stream stream) {
        driver.check(driver.cuMemcpyAsync(to, from, bytes, stream), "cuMemcpyAsync");
    }
};

}  // namespace

void bind_stream(nb::module_ &m) {
    m.def("use_tensors", [](nb::handle type) { return tensors::use(type.ptr()); });
    m.def("describe", [](nb::args all) -> std::optional<nb::bytes> {
        const nb::object found = nb::steal(tensors::describe(all.ptr()));
        if (!found) throw nb::python_error();
        return found.is_none() ? std::nullopt : std::optional(nb::borrow<nb::bytes>(found));
    });
    nb::class_<Total>(m, "Total").def(nb::init<>()).def_rw("count", &Total::count);
    nb::class_<Call>(m, "Call")
        .def("__init__", [](Call *self, int kind, int number, size_t channels, long hash, long again, double eps,
                            double largest) { new (self) Call{kind, number, channels, hash, again, eps, largest}; });
    using Given = std::tuple<uintptr_t, std::tuple<unsigned, unsigned, unsigned>, unsigned, unsigned,
                             std::vector<std::tuple<int, uint64_t>>>;
    nb::class_<Launches>(m, "Launches").def("__init__", [](Launches *self, const std::vector<Given> &given) {
        new (self) Launches;
        for (const auto &[function, grid, threads, shared, arguments] : given) {
            const auto &[x, y, z] = grid;
            self->all.push_back({(void *)function, {x, y, z}, threads, shared, {}});
            if (arguments.size() > MOST_ARGUMENTS) throw std::runtime_error("a kernel with more than 64 arguments");
            for (const auto &[pointer, value] : arguments) self->all.back().arguments.push_back({pointer, value});
        }
    });
    const auto given = nb::arg();
    const auto maybe = nb::arg().none();
    nb::class_<StreamWorker>(m, "StreamWorker")
        .def(nb::init<const std::string &, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, intptr_t, bool, int,
                      int>())
        .def("enqueue", &StreamWorker::enqueue, given, given, given, maybe, maybe, given, given, maybe, given)
        .def("wait", &StreamWorker::wait, nb::call_guard<nb::gil_scoped_release>())
        .def("failure", &StreamWorker::failure)
        .def("forget_failure", [](StreamWorker &self) { if (self.worker) self.worker->forget_failure(); })
        .def("close", [](StreamWorker &self) { if (self.worker) self.worker->closed = true; })
        .def("stop", [](StreamWorker &self) {
            const nb::gil_scoped_release other_threads_run;
            if (self.worker) self.worker->stop();
        })
        .def("has_memory_operations", [](StreamWorker &self, int device) { return self.driver.has_memory_operations(device); })
        .def_prop_ro("failed", [](StreamWorker &self) { return self.worker && self.worker->failed; })
        .def_prop_ro("pending", [](StreamWorker &self) { return self.worker ? self.worker->pending() : 0; })
        .def_prop_ro("enqueued", [](StreamWorker &self) { return self.worker ? self.worker->enqueued.load() : 0; })
        .def_prop_ro("slots", [](StreamWorker &self) { return self.slots.size(); })
        .def_prop_ro("owned", [](StreamWorker &self) { return self.worker ? self.worker->owned.load() : 0; })
        .def_prop_ro("current", [](StreamWorker &self) { return self.worker ? self.worker->current.load() : -1; })
        .def_prop_rw("in_join", [](StreamWorker &self) { return self.worker && self.worker->in_join; },
                     [](StreamWorker &self, bool in_join) { if (self.worker) self.worker->in_join = in_join; })
        .def_prop_rw("exchanges",
                     [](StreamWorker &self) { return self.worker ? self.worker->exchanges.load() : self.exchanges_before; },
                     [](StreamWorker &self, long number) {
                         if (self.worker) self.worker->exchanges = number;
                         else self.exchanges_before = number;
                     });
}
