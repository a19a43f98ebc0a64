"""Builds the native kernels beside what setup.cfg says. If that fails, it installs the rest.

MPISYNCBN_NO_NATIVE=1 leaves them out on purpose. CXX, CFLAGS, CXXFLAGS and LDFLAGS are used: the
flags come after those of this file.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("mpisyncbn", "kernels", "cpu")
# One build serves Python 3.12 and newer: nanobind keeps to the stable ABI from there on.
STABLE_ABI = sys.version_info >= (3, 12) and not sysconfig.get_config_var("Py_GIL_DISABLED")
# The sources that take longest to compile, which start first, so that two cores end together.
LONGEST = [FOLDER / f"loops_{name}.cpp" for name in ("baseline", "avx2", "avx512")]
NATIVE = Extension(
    "mpisyncbn.kernels.cpu._cpu",
    sources=[*map(str, LONGEST), *map(str, sorted({*FOLDER.glob("*.cpp")} - {*LONGEST}))],
    depends=[*map(str, sorted(FOLDER.glob("*.h"))), "setup.py"],
    define_macros=[
        *(("NDEBUG", "1"), ("NB_COMPACT_ASSERTIONS", "1")),
        *([("Py_LIMITED_API", "0x030C0000")] if STABLE_ABI else []),
    ],
    py_limited_api=STABLE_ABI,
    extra_compile_args=[
        *("-std=gnu++17", "-O3", "-g0", "-fvisibility=hidden"),
        "-fno-strict-aliasing",  # nanobind asks for it
        *("-ffp-contract=fast", "-fno-math-errno", "-fno-wrapv"),
        *("-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-pragmas"),
    ],
    language="c++",
)
OPENMP = "#include <omp.h>\nint main() { return omp_get_max_threads(); }\n"
# Whether the processor chooses between instruction sets when it runs.
LEVELS = f'#include "{FOLDER.resolve()}/levels.h"\n#ifndef HAVE_LEVELS\n#error\n#endif\nint main() {{}}\n'
VARIABLES = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS")


class BuildNative(build_ext):
    def run(self) -> None:
        inplace, name = self.inplace, self.get_ext_filename("_cpu")
        cure = "install a C++17 compiler and Python's headers, then this again"
        try:
            if os.environ.get("MPISYNCBN_NO_NATIVE", "0") not in ("", "0"):
                cure = "unset it"
                raise RuntimeError("MPISYNCBN_NO_NATIVE is set")
            super().run()
        except Exception as error:  # whatever it is: everything works without them
            Path(self.build_lib, FOLDER, name).unlink(missing_ok=True)  # an earlier build is of other sources
            if inplace:
                (FOLDER / name).unlink(missing_ok=True)
            if isinstance(error, ImportError):
                cure = "pip install nanobind, then this again; or pip install, which gets it"
            self.extensions: list[Extension] = []  # or others would look for what it makes
            # Some setuptools' errors hold the whole command, which is printed above anyway.
            why = str(error) if len(str(error)) < 100 else "the compiler failed: see above"
            say(
                f"native kernels were not built ({why}): slower ATen and NumPy operations serve instead. "
                f"The cure: {cure}"
            )
        if inplace and STABLE_ABI:  # Python would import an earlier build for its version alone first
            (FOLDER / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        import nanobind

        home = Path(nanobind.include_dir()).parent
        ext.include_dirs = [str(home / part) for part in ("include", "src", "ext/robin_map/include")]
        # What is built holds no path of the machine that built it.
        ext.extra_compile_args += [f"-ffile-prefix-map={home}=nanobind"]
        openmp = ["-fopenmp"] if self.compiles(OPENMP, "-fopenmp") else []
        self.has_levels = self.compiles(LEVELS, "-std=gnu++17")
        ext.extra_compile_args += openmp
        ext.extra_link_args += openmp
        for name in ("CFLAGS", "CXXFLAGS"):  # setuptools puts them before ours
            ext.extra_compile_args += shlex.split(os.environ.get(name, ""))
        ext.depends += [self.conditions(nanobind.__version__)]

        # An editable install builds in a new folder each time: what lies among the sources is as
        # good, unless it is older than they are.
        target = Path(self.get_ext_fullpath(ext.name))
        earlier = FOLDER / target.name
        if self.editable_mode and earlier.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(earlier, target)
        Path(self.build_temp, FOLDER).mkdir(parents=True, exist_ok=True)
        self.compile_one, self.compiler.compile = self.compiler.compile, self.compile_all
        super().build_extension(ext)
        if not openmp:
            say("the compiler has no OpenMP: native kernels run on one thread")

    def compile_all(self, sources: list[str], **options: object) -> list[str]:
        """Compile the sources side by side, as setuptools does not."""

        def compile_one(source: str) -> list[str]:
            flags = [*options["extra_postargs"]]
            if Path(source).name == "loops_baseline.cpp" and self.has_levels:
                # For processors without AVX2: 9 s of compilation are worth more.
                flags[flags.index("-O3")] = "-O1"
            return self.compile_one([source], **{**options, "extra_postargs": flags})

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = pool.map(compile_one, sources)
            return [name for names in objects for name in names]

    def compiles(self, program: str, *flags: str) -> bool:
        """Whether the compiler takes a program."""
        with TemporaryDirectory() as folder:
            source = Path(folder, "program.cpp")
            source.write_text(program)
            options = {"output_dir": folder, "extra_postargs": [*flags]}
            try:
                objects = self.compiler.compile([str(source)], **options)
                self.compiler.link_executable(objects, "program", target_lang="c++", **options)
            except Exception:
                return False
        return True

    def conditions(self, nanobind: str) -> str:
        """A file that is new when what the sources cannot say has changed."""
        path = Path("build", "native-conditions.txt")
        text = "\n".join([nanobind, *(f"{name}={os.environ.get(name, '')}" for name in VARIABLES)])
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return str(path)


def say(line: str) -> None:
    print(f"mpisyncbn: {line}", file=sys.stderr)


setup(
    ext_modules=[NATIVE],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp312"}} if STABLE_ABI else {},
)
