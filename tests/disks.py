"""Small disks of three kinds, which a test mounts, fills and clears."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from pgtemp.supervisor.leftovers import PREFIX
from support import eventually

_LITTLE_BYTES, _LITTLE_FILES = 3 << 20, 40
_SMALLEST = 512


@dataclass
class Disk:
    """A mounted file system.

    Attributes:
        kind: tmpfs, ext4, or inodes: a tmpfs that allows only a number of files.
        path: where it is mounted.
        size: in megabytes.
    """

    kind: str
    path: Path
    size: int
    _loop: str = ""

    def mount(self) -> None:
        """Mount it, or skip the test if that is not allowed."""
        if os.geteuid() != 0:
            pytest.skip("only root can mount a small disk")
        if self.kind == "ext4":
            self._mount_image()
        else:
            files = ",nr_inodes=4000" if self.kind == "inodes" else ""
            options = f"size={self.size}m,mode=1777{files}"
            argv = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)]
            if subprocess.run(argv, check=False).returncode != 0:
                pytest.skip("nothing can be mounted here")

    def _mount_image(self) -> None:
        if shutil.which("mkfs.ext4") is None or shutil.which("losetup") is None:
            pytest.skip("there is no mkfs.ext4 or no losetup")
        image = self.path.with_suffix(".img")
        with open(image, "wb") as file:
            file.truncate(self.size << 20)
        try:
            subprocess.run(
                ["mkfs.ext4", "-q", "-m", "0", "-b", "4096", "-N", "8000", image], check=True
            )
            argv = ["losetup", "--find", "--show", str(image)]
            found = subprocess.run(argv, check=False, capture_output=True, text=True)
        finally:
            image.unlink()  # it exists as long as the device
        if found.returncode != 0:
            pytest.skip(f"there is no loop device: {found.stderr.strip()}")
        self._loop = found.stdout.strip()
        if subprocess.run(["mount", self._loop, str(self.path)], check=False).returncode != 0:
            self._detach()
            pytest.skip("no loop device can be mounted here")
        self.path.chmod(0o1777)

    def _detach(self) -> None:
        if self._loop:
            subprocess.run(["losetup", "--detach", self._loop], check=True)

    def unmount(self) -> None:
        """Unmount it; no process may use it."""
        argv = ["umount", str(self.path)]
        free = eventually(lambda: subprocess.run(argv, check=False).returncode == 0)
        if not free:
            subprocess.run([*argv, "--lazy"], check=True)
        self._detach()
        assert free, f"a process uses {self.path}"

    def fill(self, *, leave_little: bool = False) -> None:
        """Leave no space, or a little: enough for some rows, not for a server or a database."""
        if self.kind == "inodes":
            room = os.statvfs(self.path).f_favail - (_LITTLE_FILES if leave_little else 0)
            with suppress(OSError):
                self.ballast.mkdir(exist_ok=True)
            with suppress(OSError):
                while room > 1 or not leave_little:
                    (self.ballast / os.urandom(8).hex()).touch()
                    room -= 1
            return
        size = 16 << 20
        with open(self.ballast, "ab") as file:
            end = file.tell()
            while size >= _SMALLEST:
                try:
                    if leave_little and self.free - size < _LITTLE_BYTES:
                        raise OSError
                    os.posix_fallocate(file.fileno(), end, size)
                    end += size
                except OSError:
                    size //= 2

    @contextmanager
    def kept_full(self) -> Iterator[None]:
        """Fill it, and fill space that becomes free meanwhile; clear it at the end."""
        over = threading.Event()

        def fill_again() -> None:
            while not over.wait(0.001):
                self.fill()

        self.fill()
        thread = threading.Thread(target=fill_again)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.clear()

    def clear(self) -> None:
        """Free the space again."""
        if self.ballast.is_dir():
            shutil.rmtree(self.ballast)
        else:
            self.ballast.unlink()

    @property
    def ballast(self) -> Path:
        return self.path / "ballast"

    @property
    def free(self) -> int:
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    @property
    def homes(self) -> list[Path]:
        """The run directories on it."""
        return list(self.path.glob(f"{PREFIX}*"))
