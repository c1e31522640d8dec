"""A Slurm cluster of one node on this machine, for tests: munge, the controller and the node's daemon on
loopback."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

CONFIGURATION = Path("/etc/slurm/slurm.conf")  # Slurm's standard place: its commands look nowhere else
MARK = "# written by the SimDiff workbook's tests"
DAEMONS = ("munged", "slurmctld", "slurmd")


def why_not() -> str | None:
    """Why no cluster can be started here; None where one can."""
    if sys.platform != "linux" or os.geteuid():
        return "a Slurm cluster of one node is started as root on Linux"
    missing = [name for name in (*DAEMONS, "sbatch", "munge") if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)} missing: apt-get install slurm-wlm munge"
    if CONFIGURATION.exists() and MARK not in CONFIGURATION.read_text():
        return f"{CONFIGURATION} is there already: this machine belongs to a cluster"
    return None


@contextmanager
def start_cluster(folder: Path) -> Iterator[None]:
    """Run a cluster for as long as a `with` block lasts; its state, logs and process numbers lie in
    `folder`."""
    stop_cluster()  # one that a killed test left
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().split(".")[0]
    memory_mb = psutil.virtual_memory().total // 2**20
    CONFIGURATION.parent.mkdir(parents=True, exist_ok=True)
    CONFIGURATION.write_text(f"""{MARK}
ClusterName=simdiff
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MinJobAge=86400
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_interval=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory={memory_mb} State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
    try:
        if subprocess.run(["munge", "-n"], capture_output=True).returncode:
            run = Path("/run/munge")
            run.mkdir(exist_ok=True)
            shutil.chown(run, "munge", "munge")
            subprocess.run(["runuser", "-u", "munge", "--", shutil.which("munged")], check=True)
        subprocess.run([shutil.which("slurmctld")], check=True)
        subprocess.run([shutil.which("slurmd"), "-N", host], check=True)
        for _ in range(300):
            if "idle" in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout:
                break
            time.sleep(0.2)
        else:
            raise RuntimeError("the node never became idle:\n" + (folder / "slurmctld.log").read_text())
        yield
    finally:
        stop_cluster()


def stop_cluster() -> None:
    """Stop the daemons of a cluster of ours, and take its configuration away."""
    if not CONFIGURATION.exists() or MARK not in CONFIGURATION.read_text():
        return
    names = (*DAEMONS, "slurmstepd")
    ours = [process for process in psutil.process_iter(["name"]) if process.info["name"] in names]
    for process in ours:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(ours, timeout=10)
    CONFIGURATION.unlink()


if __name__ == "__main__":  # python -m benchmarks.slurm_cluster COMMAND ...: run it while a cluster is up
    import tempfile

    if reason := why_not():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as scratch, start_cluster(Path(scratch)):
        sys.exit(subprocess.run(sys.argv[1:]).returncode)
