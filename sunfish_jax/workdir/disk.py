"""Which errors mean that a disk takes no more."""

import errno

_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large", "Read-only file system")


def disk_problem(error: BaseException | None) -> str | None:
    """What is wrong with the disk, if that is what `error`, or one that it came from, is about; or else None.

    Libraries wrap the system's error, or give it as text only.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NUMBERS:
            return error.strerror
        for text in _TEXTS:
            if text in str(error):
                return text
        error = error.__cause__ or error.__context__
    return None
