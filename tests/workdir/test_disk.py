import errno

import pytest

from sunfish_jax.workdir.disk import disk_problem


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_the_systems_error_is_recognised_behind_others(number):
    try:
        try:
            raise OSError(number, "the system's words")
        except OSError as error:
            raise RuntimeError("a library's words") from error
    except RuntimeError as error:
        assert disk_problem(error) == "the system's words"


def test_an_error_given_as_text_is_recognised():
    assert disk_problem(ValueError("INTERNAL: write: No space left on device [/a/b]")) == "No space left on device"


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), ValueError("No"), None])
def test_other_errors_are_none_of_the_disks(error):
    assert disk_problem(error) is None
