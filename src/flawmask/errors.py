"""The one error that Flawmask raises on purpose."""


class FlawmaskError(Exception):
    """Something the user can mend: the message names the file, what is wrong with it and what to do.

    The command line prints it as one line and exits with status 2.
    """


class ImageError(FlawmaskError):
    """A file that cannot be read as an image."""
