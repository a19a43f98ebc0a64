"""The ranks on one machine, and this rank's place among them."""

from __future__ import annotations

from .. import config
from . import launcher
from .communicator import world
from .groups import AnyGroup, resolve
from .runtime import mpi

__all__ = ["local_rank", "ranks_on_node_of"]


def local_rank(comm: AnyGroup = None) -> int:
    """This rank's place among the ranks of ``comm`` on its machine, from 0.

    It tells a rank which GPU to take::

        torch.cuda.set_device(mpisyncbn.local_rank() % torch.cuda.device_count())

    The remainder is for launchers that show each rank one GPU only. MPI knows which ranks share
    memory, while variables such as SLURM_LOCALID are wrong under other launchers. Ranks in
    containers may share no memory: they are found by the name and the boot of their machine.

    Args:
        comm: an mpi4py communicator, a Communicator, a process group of torch.distributed, or None
            for the world.

    Returns:
        A number from 0 to one less than the ranks of ``comm`` on this machine.

    Raises:
        TypeError, ValueError: ``comm`` is none of these, or does not contain this rank.

    Collective: every rank of ``comm`` must call.
    """
    group = resolve(comm, "comm").ready()
    if group is world():
        launcher.warn_world_size(mpi())
    with group.collective("finding the ranks of each machine"):
        shared = group.comm.Split_type(mpi().COMM_TYPE_SHARED, key=group.rank)
        first = shared.bcast(group.rank)
        shared.Free()
        gathered = group.comm.allgather((first, config.machine()))
    return ranks_on_node_of(gathered, group.rank).index(group.rank)


def ranks_on_node_of(gathered: list[tuple[int, tuple[str, str]]], rank: int) -> list[int]:
    """The ranks that share memory with ``rank``, or a machine with any of those, in order."""
    firsts, machines = {gathered[rank][0]}, {gathered[rank][1]}
    while True:
        found = [r for r, (first, machine) in enumerate(gathered) if first in firsts or machine in machines]
        known = len(firsts), len(machines)
        firsts.update(gathered[r][0] for r in found)
        machines.update(gathered[r][1] for r in found)
        if known == (len(firsts), len(machines)):
            return found
