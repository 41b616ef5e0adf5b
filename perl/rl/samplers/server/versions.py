"""Adapters on their way to servers: each version is a folder of its own, named by its weights, and stays as it is.

The same name with other weights would be served from a stale prefix cache. A folder that is gone while a server
still knows its adapter ends the server. So a version is unloaded when the next but one is there, and its folder is
removed once the version after that is.
"""

import hashlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from perl.adapters.lora import Lora
from perl.errors import UserError
from perl.rl.samplers.server.client import Server, ServerError
from perl.roles.export_formats import save_adapter
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from perl.system.files import user_named, whole_folder

NAME = re.compile(rf"({Role.SFT}|{Role.POLICY})-[0-9a-f]{{16}}")
"""What the names of versions look like; all else in the folder is not ours."""
KEPT = 2
"""Versions of the policy that servers know: the newest, and the one before."""


def version_of(roles: SharedBase, role: Role, folder: Path) -> str:
    """A role's name and the start of a SHA-256, of its weights and of the folder: servers may have other runs'."""
    digest = hashlib.sha256(str(folder).encode())
    for name, weight in sorted(roles.weights(role).items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
    return f"{role}-{digest.hexdigest()[:16]}"


class Versions:
    """The versions that the servers have, written and removed by the main process alone.

    Args:
        folder: of this run; the servers see it under the same path.

    Raises:
        UserError: the adapters are of a kind that vLLM does not serve.
    """

    def __init__(self, roles: SharedBase, servers: Sequence[Server], folder: Path) -> None:
        assert isinstance(roles.adapter, Lora)
        if roles.adapter.config.target_parameters:
            raise UserError(
                "vLLM is not known to serve adapters on experts",
                where="rl.sampler",
                remedy="Name targets without the experts, such as attention, or leave rl.sampler out.",
            )
        self._roles, self._servers, self._folder = roles, servers, folder.absolute()
        self._policies: list[str] = []
        """Those of the policy that the servers know, the newest last."""
        self._unloaded: list[str] = []
        """Whose folders go next."""
        self.in_use: str | None = None
        """A version that is drawn with meanwhile."""

    def publish(self, role: Role) -> str:
        """Bring a role's weights of now to every server; their name there.

        Raises:
            UserError: the folder cannot be written.
            ServerError: a server does not take them, or lists others by their name.
        """
        first, name = not self._policies, version_of(self._roles, role, self._folder)
        if not (self._folder / name).exists():
            with user_named(self._folder), whole_folder(self._folder / name) as unfinished:
                save_adapter(self._roles, role, role, str(self._roles.lm.name_or_path), unfinished)
                for file in (unfinished, *unfinished.iterdir()):  # servers may run as somebody else
                    file.chmod(0o755 if file.is_dir() else 0o644)
        for server in self._servers:
            self.load(server, name)
        if role is Role.POLICY:
            self._policies = [*(one for one in self._policies if one != name), name]
            self._retire(everything_else=first)
        return name

    def load(self, server: Server, name: str) -> None:
        """Let a server have a version that is written, and see that it says so."""
        folder = str(self._folder / name)
        if name not in server.models():
            server.load(name, folder)
        listed = server.models().get(name)
        if listed is None or listed.root != folder:
            has = "no such adapter" if listed is None else f"another folder, {listed.root}"
            raise ServerError(
                f"the server said that it has loaded {name}, and lists {has}",
                where=server.url,
                remedy="Start it with --max-loras as `perl-rlhf sampler RECIPE` says, and without a load balancer "
                "or --data-parallel-size in front: name every replica in rl.sampler.url.",
            )

    def _retire(self, everything_else: bool) -> None:
        """Remove the folders of versions unloaded before, and unload those that are no longer wanted.

        Args:
            everything_else: what an earlier process of this run left, too.
        """
        for name in self._unloaded:
            if name not in self._policies:
                shutil.rmtree(self._folder / name, ignore_errors=True)
        old = [name for name in self._policies[:-KEPT] if name != self.in_use]
        self._policies = [name for name in self._policies if name not in old]
        if everything_else:
            ours = (path.name for path in self._folder.iterdir() if NAME.fullmatch(path.name))
            current = {*self._policies, *(version_of(self._roles, role, self._folder) for role in self._served())}
            old = sorted({*old, *ours} - current)
        for server in self._servers:
            for name in old:
                server.unload(name)
        self._unloaded = old

    def _served(self) -> list[Role]:
        return [role for role in (Role.SFT, Role.POLICY) if role in self._roles.roles]
