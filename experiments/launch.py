"""Starts a script n times on this machine, as one job of n JAX processes with a CPU device each.

    python -m experiments.launch --processes 4 -- -m experiments.SCRIPT ARGS

What follows `--` goes to Python. The script calls `experiments.cluster.initialize()` first. Lines
of output are marked with the number of the process. When one fails, all are ended, and the exit
code is its own; of one that a signal killed, 128 and the signal.

Nothing listens outside of this machine. JAX's collectives on CPUs (gloo) take the address that
the machine's name stands for, and there is no public setting for it; where that is not a loopback
address, the processes run in a UTS namespace in which the machine is called `localhost`. That
needs no root, but Linux's `unshare` and user namespaces; without them it is an error that names
the line for /etc/hosts.
"""

import argparse
import contextlib
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

from experiments import cluster


GRACE = 5.0  # seconds from the request to end to the end
POLL = 0.05  # seconds


def main(args=None):
    parser = argparse.ArgumentParser(
        prog="python -m experiments.launch",
        usage="%(prog)s [-h] [--processes N] [--timeout SECONDS] -- -m MODULE ARGS",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for the whole job")
    parser.add_argument("script", nargs="+", metavar="-- -m MODULE ARGS")
    options = parser.parse_args(args)
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}.")
    try:
        prefix = loopback_prefix()
    except OSError as error:
        parser.error(str(error))
    address = f"127.0.0.1:{free_port()}"
    jobs = [
        (
            [*prefix, sys.executable, *options.script],
            environment(address, options.processes, process_id),
        )
        for process_id in range(options.processes)
    ]
    return run(jobs, timeout=options.timeout)


def environment(address, processes, process_id):
    """Of a process: ours, and what `cluster.initialize` and JAX are to know."""
    # The coordinator is not behind a proxy. (JAX warns of any variable of such a name.)
    proxies = [name for name in os.environ if name.lower().endswith("_proxy")]
    direct = {"no_grpc_proxy": address.rsplit(":", 1)[0]} if proxies else {}
    return (
        os.environ
        | direct
        | {
            cluster.COORDINATOR: address,
            cluster.PROCESSES: str(processes),
            cluster.PROCESS_ID: str(process_id),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "PYTHONUNBUFFERED": "1",
        }
    )


def run(jobs, *, timeout=None, write=None):
    """Runs commands side by side until all have ended or one has failed.

    Args:
      jobs: (command, environment) of each.
      timeout: seconds for all together, or None.
      write: takes a line of output, marked; None: standard output.

    Returns:
      The exit code of the first that failed, 124 after the timeout, else 0.
    """
    write = sys.stdout.write if write is None else write
    deadline = None if timeout is None else time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        stack.enter_context(ended_by_sigterm())
        processes = []
        stack.callback(_end, processes)
        readers = []
        for number, (command, env) in enumerate(jobs):
            process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # so that what it starts can be ended with it
            )
            processes.append(process)
            reader = threading.Thread(target=_mark, args=(process, number, write), daemon=True)
            reader.start()
            readers.append(reader)
        code = _wait(processes, deadline, write)
    for reader in readers:
        reader.join(GRACE)
    return code


def _wait(processes, deadline, write):
    while True:
        codes = [process.poll() for process in processes]
        failed = [number for number, code in enumerate(codes) if code]
        if failed:
            code = codes[failed[0]]
            code = code if code > 0 else 128 - code
            write(f"process {failed[0]} failed with exit code {code}; ending all\n")
            return code
        if None not in codes:
            return 0
        if deadline is not None and time.monotonic() > deadline:
            write("out of time; ending all\n")
            return 124
        time.sleep(POLL)


def _mark(process, number, write):
    with process.stdout:
        for line in process.stdout:
            write(f"[{number}] {line}" if line.endswith("\n") else f"[{number}] {line}\n")


def _end(processes):
    """Asks what is left, with all that it has started, to end, and makes sure."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process, number):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def ended_by_sigterm():
    """Inside, SIGTERM raises SystemExit, as Ctrl-C raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def free_port(host="127.0.0.1"):
    with socket.socket() as found:
        found.bind((host, 0))
        return found.getsockname()[1]


def loopback_prefix(name=None):
    """What to put before a command whose gloo is to stay on the loopback interface.

    Args:
      name: the machine's, or None for the one it has.

    Raises:
      OSError: where nothing will do; it says what will.
    """
    name = socket.gethostname() if name is None else name
    if is_loopback(name):
        return []
    rename = "socket.sethostname('localhost'); os.execv(sys.argv[1], sys.argv[1:])"
    renamed = [sys.executable, "-c", f"import os, socket, sys; {rename}"]
    unshare = shutil.which("unshare")
    for rights in ([], ["--map-root-user"]) if unshare and is_loopback("localhost") else ():
        prefix = [unshare, "--uts", *rights, "--", *renamed]
        if subprocess.run([*prefix, sys.executable, "-c", ""], capture_output=True).returncode == 0:
            return prefix
    raise OSError(
        f"This machine's name, {name!r}, does not stand for a loopback address, and JAX's "
        "collectives would listen to the network. It cannot be renamed for them either (that takes "
        f"`unshare` and user namespaces). Add a line to /etc/hosts: 127.0.0.1 {name}"
    )


def is_loopback(name):
    """Whether every address that `name` stands for is one of the loopback interface."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return False
    return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)


if __name__ == "__main__":
    sys.exit(main())
