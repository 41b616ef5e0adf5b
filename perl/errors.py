"""The one exception that stands for a mistake the user can mend."""


class UserError(Exception):
    """Input that cannot be used: printed as one message, without a traceback, and exit status 2.

    Args:
        what: what is wrong, with the value that is.
        where: the file, line, key or folder it stands in.
        remedy: what to do about it.
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        message = f"{where}: {what}" if where else what
        super().__init__(f"{message}\n  {remedy}" if remedy else message)
