"""The base class of errors that the user can correct."""

from __future__ import annotations


class InputError(Exception):
    """An error in what the user gave: the message says what is wrong and how to correct it.

    The command line prints it without a traceback. Such an error inherits from this class and from the built-in class that
    fits. Every other exception is a bug.
    """
