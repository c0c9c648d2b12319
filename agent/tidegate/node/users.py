"""Names of users and groups, as this machine knows them: annotations may use them where they mean numbers."""

import grp
import pwd


def user_id(name: str) -> int | None:
    """Number of a user of this machine, None when there is none of that name."""
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def group_id(name: str) -> int | None:
    """Number of a group of this machine, None when there is none of that name."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None
