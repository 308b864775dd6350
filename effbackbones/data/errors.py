"""What can be wrong with a dataset."""


class DataError(ValueError):
    """A dataset is missing, damaged, or not what the recipe says."""


class BadImageError(DataError):
    """An image that cannot be read; the message names the file and the reason."""
