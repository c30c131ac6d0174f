"""The one property of an error that the console needs to know: whose fault it is."""

from __future__ import annotations


class InputError(Exception):
    """The input's fault, said so that whoever made it can mend it: the console prints it in one line, without a traceback.

    Every class of such errors inherits from this one, beside the built-in class that fits; anything else is a bug.
    """
