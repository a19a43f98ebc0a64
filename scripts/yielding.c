/* LD_PRELOAD for Debian's MPICH 4.0, whose ranks never yield the processor while they wait: four on two cores then take
 * 8 ms for an all-reduce that takes 0.05 ms with this. UCX is asked for progress in a loop; where there is none, another
 * rank may run. */
#include <dlfcn.h>
#include <sched.h>

unsigned ucp_worker_progress(void *worker)
{
    static unsigned (*progress)(void *);
    /* By name: MPICH was loaded by mpi4py, for itself alone, so that RTLD_NEXT does not see what it needs. */
    if (!progress)
        progress = (unsigned (*)(void *))dlsym(dlopen("libucp.so.0", RTLD_LAZY), "ucp_worker_progress");
    unsigned done = progress(worker);
    if (!done)
        sched_yield();
    return done;
}
