"""Two hosts run one recipe: two network namespaces connected by a virtual cable, each with its own launcher."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed.launching import finished, learned, start

NAMES = ("perl-host-0", "perl-host-1")
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*arguments: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    """Yield two namespaces on a private network, 10.213.7.0/24."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    try:
        for name in NAMES:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        ip("link", "add", "cable0", "netns", NAMES[0], "type", "veth", "peer", "cable1", "netns", NAMES[1])
        for number, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"cable{number}")
            ip("-n", name, "link", "set", f"cable{number}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], check=False)


@pytest.mark.usefixtures("hosts")
def test_two_hosts_run_a_recipe_together(recipes: dict[str, Path], alone: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    launchers = []
    for number, name in enumerate(NAMES):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        command += ["--nproc-per-node=1", f"--node-rank={number}", "--rdzv-backend=static"]
        command += [f"--master-addr={ADDRESSES[0]}", "--master-port=29513", f"--local-addr={ADDRESSES[number]}"]
        command += ["-m", "perl", "run", str(recipes["adapter"]), "--out", str(out)]
        launchers.append(start([*command], {"GLOO_SOCKET_IFNAME": f"cable{number}"}))
    words = []
    for launcher in launchers:
        status, said = finished(launcher)
        assert status == 0, said
        words.append(said)
    assert [said.count("Written:") for said in words] == [1, 0]
    one, several = learned(alone["adapter"]), learned(out)
    for tensor in one:
        torch.testing.assert_close(several[tensor], one[tensor], rtol=0, atol=1e-5, msg=tensor)
