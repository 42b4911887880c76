"""The program that serves a reward."""

import os
import signal
import socket
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from egrpo_jax import serve
from egrpo_jax.common.errors import UserError
from egrpo_jax.rewards import load_reward
from egrpo_jax.rewards.config import RemoteConfig, ScorersConfig
from egrpo_jax.rewards.remote.client import remote
from tests import programs
from tests.fault_server import numbered
from tests.toy import brightness


def test_the_program_serves_until_it_is_told_to_stop():
    command = programs.command("serve", "--reward=jpeg_incompressibility", "--port=0")
    process = subprocess.Popen(command, cwd=programs.ROOT, stderr=subprocess.PIPE, text=True)
    line = process.stderr.readline()
    assert line.startswith("jpeg_incompressibility on http://127.0.0.1:")
    reward = remote("mine", RemoteConfig(line.split()[-1], timeout=60.0, deadline=60.0))
    images, prompts = numbered(3)
    expected = load_reward("jpeg_incompressibility")(images, prompts).values
    np.testing.assert_array_equal(reward(images, prompts), expected)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert process.stderr.read() == ""
    process.stderr.close()


def test_a_second_signal_does_not_wait_for_the_reward(tmp_path):
    (tmp_path / "stuck.py").write_text(
        "import sys, threading\n"
        "def reward(images, prompts):\n"
        "    print('begun', file=sys.stderr, flush=True)\n"
        "    threading.Event().wait()\n"
    )
    command = programs.command("serve", "--reward=stuck:reward", "--port=0")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{programs.ROOT}"}
    process = subprocess.Popen(command, cwd=programs.ROOT, stderr=subprocess.PIPE, text=True, env=environment)
    url = process.stderr.readline().split()[-1]
    remote("mine", RemoteConfig(url, timeout=60.0, deadline=60.0)).start(*numbered(1))
    assert process.stderr.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT
    process.stderr.close()


@pytest.fixture
def flags(monkeypatch):
    """Sets the program's flags."""

    def put(config=None, **values):
        monkeypatch.setattr(serve, "CONFIG", SimpleNamespace(value=config))
        for name, value in ({"reward": "jpeg_compressibility", "host": "127.0.0.1", "port": 0} | values).items():
            monkeypatch.setattr(serve, name.upper(), SimpleNamespace(value=value))

    return put


def test_a_port_that_is_taken_is_named(flags):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags(port=port)
        with pytest.raises(UserError, match=f"--host=127.0.0.1 --port={port}: .*in use"):
            serve.main()


def test_a_host_that_can_be_none_is_named(flags):
    flags(host="a" * 64 + ".example")
    with pytest.raises(UserError, match=r"--host=a+\.example --port=0: "):
        serve.main()


def test_its_files_are_those_of_the_configs_section(flags, monkeypatch):
    made = []
    monkeypatch.setattr(serve, "load_reward", lambda name, scorers: made.append((name, scorers)) or brightness)
    monkeypatch.setattr(serve, "serve", lambda server: server.close())
    flags(ConfigDict({"name": "a run", "scorers": {"batch": 5}}))
    serve.main()
    flags()
    serve.main()
    assert made == [("jpeg_compressibility", ScorersConfig(batch=5)), ("jpeg_compressibility", ScorersConfig())]
    flags(ConfigDict({"scorers": {"batches": 5}}))
    with pytest.raises(UserError, match=r"config\.scorers\.batches"):
        serve.main()
