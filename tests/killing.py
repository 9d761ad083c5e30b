"""Runs that are killed: copies of a process, and the ways in which they die."""

import os
import signal
import stat
import sys

import pytest

needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="copies this process, and kills the copy by a signal"
)


def is_folder(descriptor):
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(work):
    """Start `work` in a copy of this process; it ends with 1 and says why if `work` fails.

    Returns: the copy's process id.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def ending(child):
    """Wait for a copy; its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tear_a_write(n, share):
    """At the n-th sync or the next of a file, when its bytes are not certain to be on the disk yet,
    cut it to this share of its length and die. For the rest of this process."""
    fsync = os.fsync
    count = 0

    def cut_and_die(descriptor):
        nonlocal count
        count += 1
        if count < n or is_folder(descriptor):
            return fsync(descriptor)
        os.ftruncate(descriptor, int(share * os.fstat(descriptor).st_size))
        return die()

    os.fsync = cut_and_die
