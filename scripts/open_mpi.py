"""Variables under which Open MPI runs many ranks on few cores, for tests and benchmarks.

scripts/environment.sh exports the same. Open MPI 5 reads PRTE_MCA_*, Open MPI 4 OMPI_MCA_*.
"""

# Root may start jobs. Binding is off and yielding is on: with more ranks than cores, a collective
# would otherwise take a thousand times as long.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}
# These allow more ranks than slots. Do not set them in a Slurm job: mpiexec would put all ranks on
# the first node.
OVERSUBSCRIBED = {
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
