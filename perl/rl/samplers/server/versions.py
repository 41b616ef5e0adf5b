"""Publishing of adapters to servers: each version is a separate, immutable folder, named by a hash of its weights.

The same name with other weights would be served from a stale prefix cache. A server crashes if the folder of a
loaded adapter is missing. A version is therefore unloaded when the second version after it is loaded, and its
folder is removed after the third.
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
"""Pattern of the names of versions; other files in the folder are not ours."""
KEPT = 2
"""Number of versions of the policy that servers keep: the newest and the one before."""


def version_of(roles: SharedBase, role: Role, folder: Path) -> str:
    """Return a role's name and the start of a SHA-256 of its weights and its run's folder."""
    digest = hashlib.sha256(str(folder).encode())
    for name, weight in sorted(roles.weights(role).items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
    return f"{role}-{digest.hexdigest()[:16]}"


class Versions:
    """The versions on the servers, written and removed by the main process alone.

    Args:
        folder: folder of this run; the servers see it under the same path.

    Raises:
        UserError: vLLM does not serve adapters of this kind.
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
        """The policy's versions on the servers, the newest last."""
        self._unloaded: list[str] = []
        """Unloaded versions, whose folders are removed next."""
        self.in_use: str | None = None
        """A version with which sampling is in progress."""

    def publish(self, role: Role) -> str:
        """Publish a role's current weights to every server and return their name.

        Raises:
            UserError: the folder cannot be written.
            ServerError: a server does not accept them, or lists other weights under their name.
        """
        first, name = not self._policies, version_of(self._roles, role, self._folder)
        if not (self._folder / name).exists():
            with user_named(self._folder), whole_folder(self._folder / name) as unfinished:
                save_adapter(self._roles, role, role, str(self._roles.lm.name_or_path), unfinished)
                for file in (unfinished, *unfinished.iterdir()):  # servers may run as another user
                    file.chmod(0o755 if file.is_dir() else 0o644)
        for server in self._servers:
            self.load(server, name)
        if role is Role.POLICY:
            self._policies = [*(one for one in self._policies if one != name), name]
            self._retire(everything_else=first)
        return name

    def load(self, server: Server, name: str) -> None:
        """Load a written version on a server, and check that the server lists it."""
        folder = str(self._folder / name)
        if name not in server.models():
            server.load(name, folder)
        listed = server.models().get(name)
        if listed is None or listed.root != folder:
            has = "no such adapter" if listed is None else f"another folder, {listed.root}"
            raise ServerError(
                f"the server reported that it loaded {name}, but lists {has}",
                where=server.url,
                remedy="Start it with the --max-loras of `perl-rlhf sampler RECIPE`, and without a load balancer "
                "or --data-parallel-size in front: name every replica in rl.sampler.url.",
            )

    def _retire(self, everything_else: bool) -> None:
        """Remove the folders of unloaded versions, and unload versions that are no longer needed.

        Args:
            everything_else: also unload and remove what an earlier process of this run left.
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
