"""What a run leaves behind: JSON lines and pictures, never half a file."""

import contextlib
import json
import os
import pathlib
import platform
import subprocess
import sys
from importlib import metadata

import jax


try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None


def header(config, command, **more):
    """The first line of a record: the settings, and all that a repetition would need to match."""
    packages = ("jax", "jaxlib", "optax", "flax")
    return {
        "command": command,
        "config": config,
        "commit": _git_commit(),
        "versions": {"python": platform.python_version()}
        | {package: metadata.version(package) for package in packages},
        "platform": f"{platform.system()} {platform.machine()}, {jax.default_backend()}",
        "devices": sorted({device.device_kind for device in jax.devices()}),
        "cpu_count": os.cpu_count(),
        **more,
    }


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary name beside `path`, which takes its place once the block has succeeded."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def only_writer(path):
    """Until the block ends, no other process comes in with the same `path`.

    The lock is the kernel's: of a process that was killed nothing stays but an empty file.

    Raises:
      ValueError: where another process is in such a block.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"Another process is writing {str(path)!r}: wait until it ends, or pass another "
                "--out."
            ) from None
        except OSError:
            pass  # a file system without locks
        yield


def write_lines(path, records):
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_lines(path):
    """The header and the list of records of a file by `write_lines`."""
    found = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"Line {number} of {str(path)!r} is no JSON, as where a file was cut short: "
                "remove the line, or get the file anew."
            ) from error
    if not found:
        raise ValueError(f"The record {str(path)!r} is empty: remove it, or get the file anew.")
    return found[0], found[1:]


def write_json(path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path):
    return json.loads(_read(path))


def command_line(module, args=None):
    """`python -m module args`, with the interpreter's own arguments where `args` is None."""
    return " ".join(["python", "-m", module, *(sys.argv[1:] if args is None else args)])


def _read(path):
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"There is no record {str(path)!r}: run the experiment first.")
    return path.read_text()


def _git_commit():
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    folder = pathlib.Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
