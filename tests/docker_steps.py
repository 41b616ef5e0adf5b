"""Run the Dockerfiles' steps without an engine: their own commands, in a clean root folder, as their users.

    python -m tests.docker_steps docker/cpu.Dockerfile docker/cuda.Dockerfile

It needs root on Linux to make mounts. The root folder has only /usr and /etc of this machine, which replace the
base image together with this Python (changes to them go elsewhere), and the folders in which pip is configured to
look for packages. Every RUN, COPY, ENV, WORKDIR and USER is executed in order; at the end the image's user runs
the entry point and the health check. With `--installed`, pip finds this Python's libraries already installed and
needs no network, so the same steps take seconds.
"""

import argparse
import os
import re
import shutil
import string
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.dockerfile import Instruction, Stage, context_files, read_dockerfile

PROJECT = Path(__file__).parent.parent
GPU = Path("/dev/nvidia0")
LIBRARIES = Path(sysconfig.get_path("purelib"))
OWN = ("perl_rlhf", "__editable__")
"""Prefixes of this project's own entries in `LIBRARIES`."""


class Root:
    """The file system of one stage, and the state its instructions change."""

    def __init__(self, path: Path, context: Path, installed: bool) -> None:
        self.path = path
        self.context = context
        self.directory = "/"
        self.user = "0:0"
        self.shown: list[Path] = []
        home = Path(sys.base_prefix)
        self.environment = {
            **{name: value for name, value in os.environ.items() if name.startswith("PIP_")},
            "PATH": f"{home}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": "/root",
        }
        for name in ("usr", "etc"):
            self._over(Path("/") / name)
        for link in ("bin", "sbin", "lib", "lib64"):
            if Path("/", link).is_symlink():
                (path / link).symlink_to(os.readlink(f"/{link}"))
        for folder in ("/dev", "/proc", *(str(folder) for folder in _packages())):
            self.bind(Path(folder), folder)
        if not home.is_relative_to("/usr"):
            self.bind(home, str(home))
        (path / "tmp").mkdir()
        (path / "tmp").chmod(0o1777)
        if installed:
            self._show_libraries()

    def inside(self, place: str) -> Path:
        """Return the place on this machine of a path of the image, relative to the working directory."""
        return self.path / os.path.normpath(os.path.join(self.directory, place)).lstrip("/")

    def bind(self, source: Path, place: str) -> None:
        """Make a folder of this machine visible in the root."""
        self.inside(place).mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--rbind", source, self.inside(place)], check=True)
        self.shown.append(self.inside(place))

    def megabytes(self) -> float:
        """Return the size of all that the instructions so far have written, except in /usr and /etc."""
        others = [f"--exclude={place}" for place in self.shown]
        told = subprocess.run(
            ["du", "-sx", "-B1000", *others, self.path], capture_output=True, text=True, check=True
        )
        return int(told.stdout.split()[0]) / 1000

    def run(self, command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command as the current user in the current working directory and environment."""
        enter = ["chroot", f"--userspec={self.user}", "--groups=", str(self.path)]
        into = ["sh", "-c", 'cd "$0" && exec "$@"', self.directory]
        settings = [f"{name}={value}" for name, value in {**self.environment, **more}.items()]
        return subprocess.run(
            [*enter, "env", "-i", *settings, *into, *command], capture_output=True, text=True, check=False
        )

    def _over(self, folder: Path) -> None:
        """Make a folder of this machine visible; changes to it are written outside it, next to the root."""
        place = self.inside(str(folder))
        changed, work = (
            self.path.with_name(f"{self.path.name}-{folder.name}-{name}") for name in ("upper", "work")
        )
        for made in (place, changed, work):
            made.mkdir(parents=True)
        options = f"lowerdir={folder},upperdir={changed},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, place], check=True)
        self.shown.append(place)

    def _show_libraries(self) -> None:
        """Make this Python's libraries, but not this project, importable in every Python."""
        self.bind(LIBRARIES, str(LIBRARIES))
        seen = self.inside("/seen/site-packages")  # dill goes by that name
        seen.mkdir(parents=True)
        for entry in LIBRARIES.iterdir():
            if not entry.name.startswith(OWN):
                (seen / entry.name).symlink_to(entry)
        self.environment |= {
            "PYTHONPATH": "/seen/site-packages",
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
        }


def _packages() -> Iterator[Path]:
    """Yield the folders of this machine in which pip is configured to look for packages."""
    told = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    for found in sorted({Path(text) for text in re.findall(r"(?<![/\w])(?:/[\w.-]+)+", told.stdout)}):
        if found.is_dir():
            yield found


def make_context(folder: Path) -> Path:
    """Copy the build context that an engine would receive."""
    for name in context_files(PROJECT):
        source, target = PROJECT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return folder


def do(step: Instruction, root: Root, roots: dict[str, Root]) -> None:
    """Execute one instruction; those that only describe the image do nothing here."""
    match step.keyword:
        case "RUN":
            for mount in step.flags.get("mount", []):
                _mount(dict(part.split("=", 1) for part in mount.split(",")), root, roots)
            done = root.run(["sh", "-c", step.text])
            if done.returncode:
                sys.exit(f"{step}\nleft with status {done.returncode}:\n{done.stdout}{done.stderr}")
        case "COPY":
            _copy(step, root, roots)
        case "ENV":
            for word in step.words:
                name, _, value = word.partition("=")
                root.environment[name] = string.Template(value).substitute(root.environment)
        case "ARG":
            name, _, value = step.text.partition("=")
            root.environment.setdefault(name, os.environ.get(name, value.strip('"')))
        case "WORKDIR":
            root.directory = os.path.join(root.directory, step.text)
            root.inside(".").mkdir(parents=True, exist_ok=True)
        case "USER":
            root.user = step.text


def _mount(options: dict[str, str], root: Root, roots: dict[str, Root]) -> None:
    if options["type"] == "cache":
        kept = Path.home() / ".cache" / "pip"
        kept.mkdir(parents=True, exist_ok=True)
        root.bind(kept, options["target"])
    else:
        root.bind(roots[options["from"]].inside(options["source"]), options["target"])


def _copy(step: Instruction, root: Root, roots: dict[str, Root]) -> None:
    *sources, place = step.words
    target = root.inside(place)
    for name in sources:
        source = roots[step.flags["from"][0]].inside(name) if "from" in step.flags else root.context / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            file = target / source.name if place.endswith("/") else target
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, file)
            for mode in step.flags.get("chmod", []):
                file.chmod(int(mode, 8))


def build(file: Path, folder: Path, installed: bool) -> tuple[Root, Stage]:
    """Execute all steps of a Dockerfile, printing each RUN's time and the size of the root after it."""
    context = make_context(folder / "context")
    roots: dict[str, Root] = {}
    for stage in read_dockerfile(file):
        print(f"FROM {stage.base}: stage {stage.name}", flush=True)
        root = roots[stage.name] = Root(folder / f"stage-{stage.name}", context, installed)
        for step in stage.instructions:
            begin = time.perf_counter()
            do(step, root, roots)
            if step.keyword == "RUN":
                seconds, size = time.perf_counter() - begin, root.megabytes()
                print(f"{seconds:6.1f} s  {size:6.0f} MB in all  {step}", flush=True)
    return root, stage


def use(root: Root, stage: Stage) -> None:
    """Run the image's command and its health check, as a user and an engine do."""
    entry = root.run([*stage.last("ENTRYPOINT").words, *stage.last("CMD").words])
    if entry.returncode or "Usage: perl-rlhf" not in entry.stdout:
        sys.exit(f"the entry point left with status {entry.returncode}:\n{entry.stdout}{entry.stderr}")
    command = stage.health_check()
    begin = time.perf_counter()
    check = root.run(command)
    print(f"{time.perf_counter() - begin:6.1f} s  {' '.join(command)}, as user {root.user}", flush=True)
    if "cuda" in command and not GPU.exists():
        wanted, said = check.returncode == 1, "unhealthy: no GPU did it"
    else:
        wanted, said = check.returncode == 0, "healthy"
    if not wanted or said not in check.stdout + check.stderr:
        sys.exit(f"the health check left with status {check.returncode}:\n{check.stdout}{check.stderr}")
    shown = [place for mount in root.shown for place in (mount, *mount.parents)]  # this project may be in /tmp
    if left := [entry.name for entry in root.inside("/tmp").iterdir() if entry not in shown]:
        sys.exit(f"the health check left in /tmp: {left}")


def main() -> None:
    """Build each Dockerfile in mounts that end with the process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--installed", action="store_true", help="use the libraries of this Python")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:  # in its own mount namespace
        use(*build(arguments.files[0], arguments.folder, arguments.installed))
        return
    if sys.platform != "linux" or os.getuid() != 0:
        sys.exit("This mounts folders and changes users: run it as root on Linux.")
    for file in arguments.files:
        # The folder is removed by a process that does not see the mounts, so nothing behind them can be.
        with tempfile.TemporaryDirectory() as folder:
            apart = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.docker_steps"]
            options = ["--installed"] if arguments.installed else []
            done = subprocess.run([*apart, str(file), "--folder", folder, *options], cwd=PROJECT, check=False)
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    main()
