"""Whether nobody but this user and root can have written a file, as code that runs must not be another user's."""

import os
import stat
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

LINKS = 40
UID_MAP, OVERFLOW = Path("/proc/self/uid_map"), Path("/proc/sys/kernel/overflowuid")


def distrust(folder: Path) -> str | None:
    """Why others than this user and root may put files into a folder that exists, in words; None if they cannot.

    They can if they own or may write the folder, a folder above it (sticky ones, as /tmp, let nobody rename what is
    another's), or a link on the way."""
    if sys.platform == "win32":
        return None
    folder = folder.absolute()
    for passed in _way(folder):
        status = passed.lstat()
        # The last one is no parent: names in it are chosen by us, and a sticky folder lets others be first.
        last = passed == folder or passed == folder.resolve()
        if not owned(status) and (last or not _roots_unmapped(status.st_uid)):
            return f"{passed} is of {_user(status.st_uid)}, not of {_user(os.geteuid())} or root"
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX and not last
        if others_write(status) and not sticky:
            return f"{passed} can be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def owned(status: os.stat_result) -> bool:
    """Is it this user's or root's?"""
    return sys.platform == "win32" or status.st_uid in (0, os.geteuid())


def others_write(status: os.stat_result) -> bool:
    """May others than the owner write it? A group that has its owner's name and no other member counts as the owner:
    many systems give every user such a group, and let it write."""
    if sys.platform == "win32" or stat.S_ISLNK(status.st_mode):
        return False
    by_group = status.st_mode & stat.S_IWGRP and not _of_one(status.st_gid, status.st_uid)
    return bool(status.st_mode & stat.S_IWOTH or by_group)


def _way(path: Path) -> Iterator[Path]:
    """Every folder and every link that opening the path passes, the path itself last."""
    at, ahead, links = Path(path.anchor), list(reversed(path.parts[1:])), 0
    yield at
    while ahead:
        name = ahead.pop()
        if name == "..":
            at = at.parent
            continue
        at /= name
        yield at
        if at.is_symlink():
            links += 1
            if links > LINKS:
                raise OSError(0, f"{path} passes more than {LINKS} links")
            target = at.readlink()
            at = Path(target.anchor) if target.is_absolute() else at.parent
            ahead += reversed(target.parts[1:] if target.is_absolute() else target.parts)


@cache
def _of_one(gid: int, uid: int) -> bool:
    if sys.platform == "win32":
        return True
    import grp
    import pwd

    try:
        group, owner = grp.getgrgid(gid), pwd.getpwuid(uid)
    except KeyError:
        return False
    return group.gr_name == owner.pw_name and set(group.gr_mem) <= {owner.pw_name}


def _roots_unmapped(uid: int) -> bool:
    """Is this what root's files look like in a container whose root is not the system's? There / and /home belong to
    the number that stands for every user the container has none for."""
    try:
        outside = {int(line.split()[1]) for line in UID_MAP.read_text(encoding="ascii").splitlines()}
        return 0 not in outside and uid == int(OVERFLOW.read_text(encoding="ascii"))
    except FileNotFoundError:
        return False


def _user(uid: int) -> str:
    if sys.platform == "win32":
        return str(uid)
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
