/* What MPI does by itself, without Python: the floor of an exchange, and the bytes that it sends. */

#include <mpi.h>
#include <stdlib.h>

/* To find out whether this was compiled for the library that the process runs. */
int handle_size(void) { return (int)sizeof(MPI_Comm); }

int library_version(char *version)
{
    int length;
    return MPI_Get_library_version(version, &length);
}

int allreduce_loop(const MPI_Comm *comm, double *message, int length, int calls)
{
    for (int call = 0; call < calls; ++call) {
        int error = MPI_Allreduce(MPI_IN_PLACE, message, length, MPI_DOUBLE, MPI_SUM, *comm);
        if (error != MPI_SUCCESS)
            return error;
    }
    return MPI_SUCCESS;
}

/* Open MPI's monitoring component counts what goes through point-to-point messages, those of a collective
   included: a PMPI wrapper would see the collective alone. */
static MPI_T_pvar_session session;
static MPI_T_pvar_handle counter;
static int peers;

int open_counter(const char *name)
{
    static MPI_Comm world; /* must outlive the handle */
    int provided, index;
    /* Open MPI 5 has MPI_Query_thread report this level from then on: ask for no less than mpi4py did. */
    int error = MPI_T_init_thread(MPI_THREAD_MULTIPLE, &provided);
    if (error == MPI_SUCCESS)
        error = MPI_T_pvar_get_index(name, MPI_T_PVAR_CLASS_SIZE, &index);
    if (error == MPI_SUCCESS)
        error = MPI_T_pvar_session_create(&session);
    world = MPI_COMM_WORLD;
    if (error == MPI_SUCCESS)
        error = MPI_T_pvar_handle_alloc(session, index, &world, &counter, &peers);
    if (error == MPI_SUCCESS)
        error = MPI_T_pvar_start(session, counter);
    return error;
}

/* Sum over all receivers since open_counter. */
int read_counter(unsigned long long *total)
{
    unsigned long long *each = malloc((size_t)peers * sizeof *each);
    if (each == NULL)
        return MPI_ERR_NO_MEM;
    int error = MPI_T_pvar_read(session, counter, each);
    *total = 0;
    for (int peer = 0; peer < peers && error == MPI_SUCCESS; ++peer)
        *total += each[peer];
    free(each);
    return error;
}
