"""The one error that reading a catalogue raises."""


class CatalogueError(ValueError):
    """Data that cannot be read as a catalogue; the message is one line that names file, line, column or id."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
